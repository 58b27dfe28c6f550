"""`ropeway quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, load


def register(app: typer.Typer) -> None:
    app.command()(quantize)


@with_settings(EngineConfig, only=("quantization_group", "revision", "download_dir"))
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Plain checkpoint: a directory, a hub name, or 'bundled'.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the quantized checkpoint.")],
    quantization: Annotated[
        Literal["int8", "int4", "fp8"],
        typer.Option(help="int8 or fp8 (W8A8, a scale per output) or int4 (W4A16, a scale and zero point per group)."),
    ] = "int8",
    *,
    flags: dict[str, Any],
) -> None:
    """Write a quantized copy of a model in the layout of compressed-tensors, which vLLM and transformers read too.

    The LM head stays plain in the copy; `ropeway serve OUT --quantization int8` (or int4) quantizes it while loading.
    """
    config, _ = load(EngineConfig, {**flags, "model": model})
    from ropeway.cli.write_quantized import run

    run(config, out, quantization)
