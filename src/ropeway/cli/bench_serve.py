"""The command around `bench serve`: prompts in, table and file out."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import typer

from ropeway.bench import report
from ropeway.bench.config import DatasetConfig, LoadConfig
from ropeway.bench.datasets import FileTokens, Words
from ropeway.bench.metrics import parse_goodput
from ropeway.bench.serve import ServeBench, bench_serve
from ropeway.cli.common import key_from
from ropeway.cli.places import Place
from ropeway.cli.progress import counting
from ropeway.errors import ConfigError

LATE = 0.1
"""Seconds behind schedule from which the load generator itself may have shaped the result."""


def run(config: LoadConfig, dataset: DatasetConfig, header: Sequence[str], goodput: Sequence[str]) -> None:
    """Measure, print the table, write the file. Exits with 1 if no request succeeded."""
    # All that can be wrong with the settings is found before the server is bothered.
    shown, _, objectives, headers = config.shown, config.percentiles, parse_goodput(goodput), _headers(header)
    if saved := config.save_result or config.save_detailed:
        Place(_folder(config) / (config.result_filename or "ropeway-bench.json"), "--result-dir")
    samples = dataset.samples(FileTokens(config.tokenizer) if config.tokenizer else Words())
    with counting("requests", len(samples)) as advance:
        bench = asyncio.run(
            bench_serve(
                config,
                samples,
                headers=headers,
                goodput=objectives,
                seed=dataset.seed,
                progress=lambda _: advance(),
            )
        )
    print(
        report.table(
            bench.metrics, shown=shown, request_rate=config.request_rate, max_concurrency=config.max_concurrency
        )
    )
    _complain(bench)
    if saved:
        _save(config, dataset, bench)
    if not bench.metrics.completed:
        raise typer.Exit(1)


def _folder(config: LoadConfig) -> Path:
    return Path(config.result_dir or "")


def _headers(items: Sequence[str]) -> dict[str, str]:
    key = key_from(os.environ)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--header is {item!r}; it must be NAME=VALUE.", param="header")
        headers[name.strip().lower()] = value
    return headers


def _complain(bench: ServeBench) -> None:
    failed = [outcome.error for outcome in bench.run.outcomes if not outcome.ok]
    if failed:
        print(f"{len(failed)} requests failed; the first: {failed[0]}", file=sys.stderr)
    if bench.run.lateness > LATE:
        print(
            f"The load generator was up to {bench.run.lateness:.2f} s behind its schedule, and latencies count from "
            "the due time. Run it on another machine, or lower --request-rate.",
            file=sys.stderr,
        )


def _save(config: LoadConfig, dataset: DatasetConfig, bench: ServeBench) -> None:
    now = datetime.now()
    label = config.label or config.backend
    path = report.result_path(
        _folder(config),
        config.result_filename,
        label=label,
        rate=config.request_rate,
        concurrency=config.max_concurrency,
        model=bench.model,
        now=now,
    )
    settings = {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "endpoint_type": config.backend,
        "backend": config.backend,
        "label": config.label,
        "model_id": bench.model,
        "tokenizer_id": config.tokenizer or bench.model,
        "num_prompts": dataset.num_prompts,
        "request_rate": "inf" if math.isinf(config.request_rate) else config.request_rate,
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
    }
    fields = report.result(bench.run, bench.metrics, shown=config.shown, detailed=config.save_detailed)
    Place(path, "--result-dir").write(json.dumps({**settings, **fields}, allow_nan=False) + "\n")
