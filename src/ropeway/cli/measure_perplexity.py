"""What `perplexity` does: read the text, build an executor for one sequence, score, and compare with a baseline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ropeway.cli.progress import counting
from ropeway.config import EngineConfig, check
from ropeway.errors import ConfigError, ModelError
from ropeway.hub import BUNDLED, locate
from ropeway.modelspec import ModelSpec, load_spec
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.perplexity import Score, score, windows
from ropeway.text.tokenizer import HubTokenizer

HELD_OUT = BUNDLED / "heldout.txt"


def run(
    config: EngineConfig, baseline: EngineConfig | None, text: Path | None, *, context: int, max_tokens: int | None
) -> None:
    """Print the score of `config`'s model, and the ratio to that of `baseline`. Raises ConfigError or ModelError."""
    spec = _spec(config)
    if context > spec.context_limit:
        raise ConfigError(
            f"context is {context}, but {config.model} is made for {spec.context_limit} tokens. Lower --context."
        )
    if baseline is not None and _spec(baseline).quantization is not None:
        raise ConfigError(f"{baseline.model} is stored quantized. Give the plain model to --against.", param="against")
    start, tokens = read(spec.directory, text or HELD_OUT, max_tokens)
    found = measure(config, start, tokens, context)
    if baseline is None:
        return
    reference = measure(baseline, start, tokens, context)
    print(f"Ratio of perplexities: {found.perplexity / reference.perplexity:.4f}")


def _spec(config: EngineConfig) -> ModelSpec:
    directory = locate(config.model, revision=config.revision, download_dir=config.download_dir)
    return load_spec(directory, config.model, config.model_impl)


def read(directory: Path, text: Path, max_tokens: int | None) -> tuple[list[int], list[int]]:
    """The mark that a text begins with, if the vocabulary sets one, and the tokens after it. Raises ConfigError."""
    tokenizer = HubTokenizer.load(directory)
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The text {text} cannot be read: {error.strerror}. Check --text.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The text {text} is not UTF-8. Convert it first.") from None
    tokens = tokenizer.encode(content, False)[:max_tokens]
    if len(tokens) < 2:
        raise ConfigError(f"The text {text} has {len(tokens)} tokens; at least 2 are needed. Check --text.")
    marked = tokenizer.encode("a")
    return ([marked[0]] if marked[0] == tokenizer.bos_id else []), tokens


def measure(config: EngineConfig, start: list[int], tokens: list[int], context: int) -> Score:
    """Load the model, score the text and print the result."""
    config = check(
        dataclasses.replace(
            config,
            max_num_seqs=1,
            max_model_len=context,
            num_kv_blocks=-(-context // config.block_size),
            enforce_eager=True,
        )
    )
    executor = LocalExecutor(config)
    try:
        info = executor.info
        if max(tokens) >= info.vocab_size:
            raise ModelError(
                f"The tokenizer of {info.model} knows tokens beyond the model's {info.vocab_size}. Check that "
                "tokenizer.json belongs to these weights."
            )
        total = len(list(windows(len(tokens), context - len(start))))
        with counting("windows", total) as done:
            found = score(
                executor.runner, tokens, context=context, chunk=config.max_num_batched_tokens, start=start, done=done
            )
    finally:
        executor.close()
    how = [config.quantization] if config.quantization != "auto" else []
    cache = [f"KV cache {config.kv_cache_dtype}"] if config.kv_cache_dtype != "auto" else []
    print(f"{info.model} ({', '.join([*how, info.dtype, *cache])})")
    print(f"  perplexity  {found.perplexity:.4f}")
    print(f"  tokens      {found.predicted:,} predicted in windows of {context}, {found.computed:,} computed")
    print(f"  speed       {found.computed / found.seconds:,.0f} tokens/s")
    return found
