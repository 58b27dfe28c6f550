"""`ropeway plan`: the memory budget of a model before any weight is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, load

PLANNED = (
    "revision", "download_dir", "model_impl", "dtype", "quantization", "quantization_group", "max_model_len",
    "block_size", "kv_cache_gib", "kv_cache_dtype", "num_kv_blocks", "gpu_memory_utilization", "kv_host_gib",
    "kv_disk_gib", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command()(plan)


@with_settings(EngineConfig, only=PLANNED)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face directory or hub name, or 'bundled'.")
    ] = "bundled",
    *,
    device: Annotated[
        str, typer.Option(help="'cpu' or 'cuda' of this machine, or a name from `--device list`.", metavar="NAME")
    ] = "cpu",
    memory_gib: Annotated[float | None, typer.Option(help="Plan for this much free memory, in GiB.", min=0.01)] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="Plan for a GPU with this much memory, in GiB; none has to be here.", min=0.01)
    ] = None,
    flags: dict[str, Any],
) -> None:
    """Show what fits on a device: weights, KV cache, and sequences by length. Reads the model's settings alone."""
    from rich.console import Console

    from ropeway.cli.budget import DEVICES, find_device, show
    from ropeway.hub import locate
    from ropeway.modelspec import load_spec

    if device == "list":
        for name, mib in DEVICES.items():
            typer.echo(f"{name:<12} {mib / 1024:.1f} GiB")
        return
    where = find_device(device, memory_gib, gpu_memory_gib)
    config, _ = load(EngineConfig, {**flags, "model": model})
    directory = locate(model, revision=config.revision, download_dir=config.download_dir, weights=False)
    spec = load_spec(directory, model, config.model_impl)
    show(config, spec, where, Console(highlight=False))
