"""`ropeway quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    app.command()(quantize)


def quantize(
    model: Annotated[str, typer.Argument(help="Plain checkpoint: a directory, a hub name, or 'bundled'.")],
    out: Annotated[Path, typer.Argument(help="New directory for the quantized checkpoint.")],
    quantization: Annotated[
        Literal["int8", "int4", "fp8"],
        typer.Option(help="int8 or fp8 (W8A8, a scale per output) or int4 (W4A16, a scale and zero point per group)."),
    ] = "int8",
    group: Annotated[int, typer.Option(help="Inputs that share a scale in int4: 32, 64 or 128.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Where hub downloads are kept.")] = None,
) -> None:
    """Write a quantized copy of a model in the layout of compressed-tensors, which vLLM and transformers read too.

    The LM head stays plain in the copy; `ropeway serve OUT --quantization int8` (or int4) quantizes it while loading.
    """
    from ropeway.cli.write_quantized import run

    run(model, out, quantization, group, revision=revision, download_dir=download_dir)
