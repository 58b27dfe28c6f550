"""`ropeway perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, load
from ropeway.modelspec import DTYPE_BYTES

ASKED = (
    "revision", "download_dir", "model_impl", "dtype", "quantization", "quantization_group", "device", "threads",
    "attention_backend", "kv_cache_dtype", "max_num_batched_tokens",
)  # fmt: skip

PLAIN = {"quantization": "auto", "kv_cache_dtype": "auto"}


def register(app: typer.Typer) -> None:
    app.command()(perplexity)


@with_settings(EngineConfig, only=ASKED)
def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face directory or hub name, or 'bundled'.")
    ] = "bundled",
    *,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to predict (default: what the bundled model left out)."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window; windows overlap by half.", min=2)] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Take this many tokens of the text at most.", min=2)] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Measure this too and print the ratio: a dtype for the same model as stored (bfloat16), or a model.",
        ),
    ] = None,
    flags: dict[str, Any],
) -> None:
    """How well a model predicts a text: perplexity by the engine's own steps. Tells what a quantization costs."""
    config, _ = load(EngineConfig, {**flags, "model": model})
    baseline = None
    if against is not None:
        changed = {"dtype": against} if against in DTYPE_BYTES else {"model": against}
        baseline, _ = load(EngineConfig, {**flags, "model": model, **PLAIN, **changed})
    from ropeway.cli.measure_perplexity import run

    run(config, baseline, text, context=context, max_tokens=max_tokens)
