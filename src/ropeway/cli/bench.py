"""`ropeway bench`: load any OpenAI server, measure offline throughput, compare static with continuous batching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.bench.config import DatasetConfig, LoadConfig
from ropeway.cli.options import with_settings
from ropeway.config import SHOWN, EngineConfig, check, load

_OF_CROWDS = (
    "max_queue", "max_logprobs", "default_priority", "promote_after", "tenant_weights", "fair_quantum",
    "kv_tenant_quota", "reserved_seats", "background_gap_ms", "promote_medium_after", "promote_low_after",
)  # fmt: skip
"""Settings that tell requests apart, or turn them away: here all are alike, and all are answered."""

bench = typer.Typer(help="Measure: a server, offline throughput, or static against continuous batching.")


def register(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench", no_args_is_help=True)


@bench.command("serve")
@with_settings(LoadConfig, DatasetConfig)
def bench_serve(
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Header to send; may be repeated.")
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Objective, such as ttft:200, tpot:50 or e2el:2000; may be repeated."),
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Load an OpenAI-compatible server and report as `vllm bench serve` does.

    Requests leave when they are due, whether or not earlier ones were answered.
    """
    # No environment: ROPEWAY_PORT and its like configure the server, and would silently change a measurement.
    config, _ = load(LoadConfig, flags, environ={})
    dataset, _ = load(DatasetConfig, flags, environ={})
    from ropeway.cli.bench_serve import run

    run(config, dataset, header or [], goodput or [])


@bench.command("throughput")
@with_settings(DatasetConfig, EngineConfig, without=("model", *_OF_CROWDS, *SHOWN))
def bench_throughput(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory or hub name.")] = "bundled",
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Tokens per second of the engine in this process, without a server."""
    dataset, _ = load(DatasetConfig, flags, environ={})
    config, _ = load(EngineConfig, {**flags, "model": model, "max_queue": dataset.num_prompts})
    from ropeway.cli.bench_throughput import run

    run(check(config), dataset, output_json)


@bench.command("batching")
@with_settings(
    EngineConfig,
    without=("model", "tokenizer", "seed", "batching", "max_num_seqs", "journal", "journal_mb", *_OF_CROWDS, *SHOWN),
)
def bench_batching(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory or hub name.")] = "bundled",
    seats: Annotated[int, typer.Option("--max-num-seqs", help="Seats.", min=1)] = 4,
    lengths: Annotated[str, typer.Option(help="Answer lengths, in tokens.")] = "50,100,200,500",
    num_prompts: Annotated[int, typer.Option(help="Requests in the long queue.", min=1)] = 24,
    input_len: Annotated[int, typer.Option(help="Prompt tokens of each request.", min=1)] = 16,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="PNG to write (default: bench-results/batching.png).")
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write no picture.")] = False,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Static against continuous batching on the same requests, with a picture of the seats."""
    config, _ = load(EngineConfig, {**flags, "model": model, "max_num_seqs": seats})
    from ropeway.cli.bench_batching import run

    picture = None if no_plot else plot or Path("bench-results/batching.png")
    run(check(config), lengths=lengths, num_prompts=num_prompts, input_len=input_len, plot=picture, output=output_json)
