"""`ropeway calibrate`: measure this machine with a model, for `ropeway sim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, check, load

MEASURED = (
    "revision", "download_dir", "model_impl", "dtype", "quantization", "quantization_group", "max_model_len", "device",
    "threads", "attention_backend", "kernel_level", "block_size", "kv_cache_gib", "kv_cache_dtype", "num_kv_blocks",
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip
"""Settings that change what a step costs or how much there is room for."""


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


@with_settings(EngineConfig, only=MEASURED)
def calibrate(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name, or 'bundled'.")] = "bundled",
    output: Annotated[Path, typer.Option(metavar="FILE", help="Profile to write.")] = Path("profile.json"),
    name: Annotated[str | None, typer.Option(help="Name of the profile (default: the file's).")] = None,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Also load a server, to measure what HTTP and text add.")
    ] = True,
    price_per_hour: Annotated[float | None, typer.Option(help="What such a machine costs in an hour.", min=0)] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Measure steps of a model on this machine, and write a profile for `ropeway sim --profile FILE`.

    Takes a minute or so; the machine should do nothing else.
    """
    config, _ = load(EngineConfig, {**flags, "model": model})
    from ropeway.cli.run_calibrate import run

    run(check(config), flags, output, name or output.stem, serve=serve, price_per_hour=price_per_hour)
