"""Command lines that cannot be understood, in the words of every other error."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import typer

from ropeway.errors import ConfigError

Misuse: Final = cast(type[Exception], typer.BadParameter.__bases__[0])
"""What typer raises for a command line that is wrong, wherever its version keeps that class."""

_ONE_DEVICE: Final = "A model runs on one device here: leave it out"
_NO_ADAPTERS: Final = "LoRA adapters cannot be loaded: leave it out, or merge them into a checkpoint"

ELSEWHERE: Final[Mapping[str, str]] = {
    # vLLM
    "--tensor-parallel-size": _ONE_DEVICE,
    "-tp": _ONE_DEVICE,
    "--pipeline-parallel-size": _ONE_DEVICE,
    "-pp": _ONE_DEVICE,
    "--data-parallel-size": "Several engines are several deployments: see --routes",
    "-dp": "Several engines are several deployments: see --routes",
    "--enable-expert-parallel": _ONE_DEVICE,
    "--distributed-executor-backend": _ONE_DEVICE,
    "--enable-lora": _NO_ADAPTERS,
    "--lora-modules": _NO_ADAPTERS,
    "--max-loras": _NO_ADAPTERS,
    "--max-lora-rank": _NO_ADAPTERS,
    "--speculative-config": "There is no speculative decoding: leave it out",
    "--trust-remote-code": "Code from a model's repository is never run: leave it out",
    "--tokenizer-mode": "The tokenizer is always that of tokenizer.json: leave it out",
    "--swap-space": "Use --kv-host-gib",
    "--cpu-offload-gb": "Weights stay on the device; for KV blocks use --kv-host-gib",
    "--kv-cache-memory-bytes": "Use --kv-cache-gib",
    "--num-gpu-blocks-override": "Use --num-kv-blocks",
    "--max-seq-len-to-capture": "CUDA graphs choose their own sizes; use --enforce-eager to have none",
    "--attention-config": "Use --attention-backend",
    "--enable-auto-tool-choice": "Leave it out: calls are read whenever a request brings tools",
    "--enable-request-id-headers": "Leave it out: x-request-id is on every answer",
    "--disable-log-requests": "Leave it out: prompts are never logged",
    "--disable-log-stats": "Use --log-stats-interval 0",
    "--uvicorn-log-level": "Use --log-level",
    "--root-path": "Let the proxy in front take the path off",
    "--ssl-keyfile": "Let a proxy in front speak TLS",
    "--ssl-certfile": "Let a proxy in front speak TLS",
    "--generation-config": "Leave it out: the checkpoint's generation_config.json is used",
    "--hf-token": "Log in with `hf auth login`, or set HF_TOKEN",
    # llama.cpp and Ollama
    "--ctx-size": "Use --max-model-len",
    "-c": "Use --max-model-len",
    "--parallel": "Use --max-num-seqs",
    "-np": "Use --max-num-seqs",
    "--n-gpu-layers": "A model is on one device as a whole: use --device",
    "-ngl": "A model is on one device as a whole: use --device",
    "--model": "Name the model right behind the verb: ropeway serve MODEL",
    "-m": "Name the model right behind the verb: ropeway serve MODEL",
    # TGI
    "--model-id": "Name the model right behind the verb: ropeway serve MODEL",
    "--max-concurrent-requests": "Use --max-queue for those that wait and --max-num-seqs for those that run",
    "--max-total-tokens": "Use --max-model-len",
    "--max-input-tokens": "Use --max-model-len",
    "--max-batch-prefill-tokens": "Use --max-num-batched-tokens",
    "--num-shard": _ONE_DEVICE,
}
"""Options that other servers have and this one has not, and what to do instead."""


def explain(error: Exception, arguments: Sequence[str]) -> ConfigError | None:
    """`error`, a `Misuse` of these `arguments`, as a sentence and a next step; None if all that can be said is help,
    which is on the screen then."""
    found = cast(Any, error)
    said = " ".join(str(found.format_message()).split()).rstrip(".")
    if type(error).__name__ == "NoArgsIsHelpError":
        return None
    if said.startswith("No such option"):
        return _unknown(found, arguments)
    step = "" if said.endswith("?") else f". See `{_verb(found, arguments)} --help`."
    return ConfigError(said + step)


def _unknown(error: Any, arguments: Sequence[str]) -> ConfigError:
    """Of letters that are written together, such as -tp, typer names the first alone; the user shall find what was
    typed."""
    option = str(error.option_name)
    typed = (a.partition("=")[0] for a in arguments if len(option) == 2 and a.startswith(option))
    name = next(typed, option)
    if name in ELSEWHERE:
        return ConfigError(f"There is no option {name}. {ELSEWHERE[name]}.", param=name)
    parameters = error.ctx.command.params if error.ctx is not None else ()
    known = [text for parameter in parameters for text in parameter.opts if text.startswith("--")]
    close = difflib.get_close_matches(name, known, n=1)
    step = f"Did you mean {close[0]}?" if close else f"`{_verb(error, arguments)} --help` lists those there are."
    return ConfigError(f"There is no option {name}. {step}", param=name)


def _verb(error: Any, arguments: Sequence[str]) -> str:
    """Where help is: typer does not always say for which command it complains."""
    if error.ctx is not None:
        return str(error.ctx.command_path)
    return " ".join(["ropeway", *itertools.takewhile(lambda word: not word.startswith("-"), arguments[:1])])
