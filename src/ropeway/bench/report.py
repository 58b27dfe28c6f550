"""The table and the result file of `bench serve`, laid out like those of `vllm bench serve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ropeway.bench.load import LoadRun
from ropeway.bench.metrics import METRICS, ServeMetrics

WIDTH = 50


def _row(label: str, value: float) -> str:
    return f"{label + ':':<40} {value:<10}" if isinstance(value, int) else f"{label + ':':<40} {value:<10.2f}"


def percentile_name(percentile: float) -> str:
    return f"{percentile:g}"


def table(
    metrics: ServeMetrics,
    *,
    shown: Sequence[str] = tuple(METRICS),
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
) -> str:
    """The result as text, 50 columns wide. Latencies are in milliseconds."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [_row("Successful requests", metrics.completed), _row("Failed requests", metrics.failed)]
    if max_concurrency is not None:
        lines.append(_row("Maximum request concurrency", max_concurrency))
    if not math.isinf(request_rate):
        lines.append(_row("Request rate configured (RPS)", float(request_rate)))
    lines += [
        _row("Benchmark duration (s)", metrics.duration),
        _row("Total input tokens", metrics.total_input),
        _row("Total generated tokens", metrics.total_output),
        _row("Request throughput (req/s)", metrics.request_throughput),
    ]
    if metrics.goodput is not None:
        lines.append(_row("Request goodput (req/s)", metrics.goodput))
    lines += [
        _row("Output token throughput (tok/s)", metrics.output_throughput),
        _row("Peak output token throughput (tok/s)", metrics.peak_output),
        _row("Peak concurrent requests", float(metrics.peak_concurrent)),
        _row("Total token throughput (tok/s)", metrics.total_throughput),
    ]
    for name in (n for n in METRICS if n in shown):
        spread, short = metrics.spreads[name], name.upper()
        lines.append(f"{METRICS[name]:-^{WIDTH}}")
        lines += [_row(f"Mean {short} (ms)", spread.mean), _row(f"Median {short} (ms)", spread.median)]
        lines += [_row(f"P{percentile_name(p)} {short} (ms)", value) for p, value in spread.percentiles.items()]
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def result(
    run: LoadRun, metrics: ServeMetrics, *, shown: Sequence[str] = tuple(METRICS), detailed: bool = True
) -> dict[str, Any]:
    """The result as JSON fields. `detailed` adds one entry per request: lengths, times, texts, errors."""
    fields: dict[str, Any] = {
        "duration": metrics.duration,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "total_input_tokens": metrics.total_input,
        "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.goodput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_throughput,
        "max_output_tokens_per_s": metrics.peak_output,
        "max_concurrent_requests": metrics.peak_concurrent,
        "rtfx": 0.0,
    }
    if detailed:
        origin = min((o.started - o.queued for o in run.outcomes), default=0.0)
        fields |= {
            "input_lens": [o.prompt_tokens for o in run.outcomes],
            "output_lens": [o.output_tokens for o in run.outcomes],
            "ttfts": [o.ttft for o in run.outcomes],
            "itls": [o.itls for o in run.outcomes],
            "latencies": [o.latency for o in run.outcomes],
            "start_times": [o.started - origin for o in run.outcomes],
            "queue_times": [o.queued for o in run.outcomes],
            "generated_texts": [o.text for o in run.outcomes],
            "errors": [o.error for o in run.outcomes],
        }
    for name in (n for n in METRICS if n in shown):
        spread = metrics.spreads[name]
        fields |= {f"mean_{name}_ms": spread.mean, f"median_{name}_ms": spread.median, f"std_{name}_ms": spread.std}
        fields |= {f"p{percentile_name(p)}_{name}_ms": value for p, value in spread.percentiles.items()}
    return fields


def result_path(
    directory: Path,
    filename: str | None,
    *,
    label: str,
    rate: float,
    concurrency: int | None,
    model: str,
    now: datetime,
) -> Path:
    """Where a result goes when only some of the name was given."""
    if filename is None:
        rate_text = "inf" if math.isinf(rate) else f"{rate:g}"
        seats = f"-concurrency{concurrency}" if concurrency else ""
        base = model.rstrip("/").rsplit("/", 1)[-1]
        filename = f"{label}-{rate_text}qps{seats}-{base}-{now:%Y%m%d-%H%M%S}.json"
    return directory / filename
