"""From outcomes to numbers. Names and definitions are those of `vllm bench serve`, so that results can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ropeway.bench.wire import Outcome
from ropeway.errors import ConfigError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(frozen=True)
class Spread:
    """One latency in milliseconds. `percentiles` maps a percentile to its value."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
        values = np.asarray(seconds if len(seconds) else [0.0]) * 1000.0
        at = {p: float(np.percentile(values, p)) for p in percentiles}
        return cls(float(values.mean()), float(np.median(values)), float(values.std()), at)


@dataclass(frozen=True, kw_only=True)
class ServeMetrics:
    """Rates are per second, over the whole run. `goodput` is None unless objectives were given."""

    completed: int
    failed: int
    duration: float
    total_input: int
    total_output: int
    request_throughput: float
    goodput: float | None
    output_throughput: float
    total_throughput: float
    peak_output: float
    peak_concurrent: int
    spreads: dict[str, Spread] = field(default_factory=dict)


def tpot(outcome: Outcome) -> float:
    """Seconds per output token after the first; 0 for an answer of one token."""
    if outcome.output_tokens < 2:
        return 0.0
    return (outcome.latency - outcome.ttft) / (outcome.output_tokens - 1)


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "e2el:5000"]` as seconds by metric. Raises ConfigError."""
    objectives = {}
    for item in " ".join(items).replace(",", " ").split():
        name, _, value = item.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in {"ttft", "tpot", "e2el"} or limit < 0:
            raise ConfigError(f"goodput {item!r} is not NAME:MILLISECONDS with ttft, tpot or e2el.", param="goodput")
        objectives[name] = limit / 1000.0
    return objectives


def compute(
    outcomes: Sequence[Outcome],
    seconds: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> ServeMetrics:
    """All numbers of one run that took `seconds`; failed requests count only as failed."""
    good = [o for o in outcomes if o.ok]
    values = {
        "ttft": [o.ttft for o in good],
        "tpot": [tpot(o) for o in good if o.output_tokens > 1],
        "itl": [gap for o in good for gap in o.itls],
        "e2el": [o.latency for o in good],
    }
    total_input, total_output = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
    peak_output, peak_concurrent = _peaks(good)
    return ServeMetrics(
        completed=len(good),
        failed=len(outcomes) - len(good),
        duration=seconds,
        total_input=total_input,
        total_output=total_output,
        request_throughput=len(good) / seconds,
        goodput=sum(_meets(o, goodput) for o in good) / seconds if goodput else None,
        output_throughput=total_output / seconds,
        total_throughput=(total_input + total_output) / seconds,
        peak_output=peak_output,
        peak_concurrent=peak_concurrent,
        spreads={name: Spread.of(values[name], percentiles) for name in METRICS},
    )


def _meets(outcome: Outcome, objectives: Mapping[str, float]) -> bool:
    seen = {"ttft": outcome.ttft, "tpot": tpot(outcome), "e2el": outcome.latency}
    return all(seen[name] <= limit for name, limit in objectives.items())


def _peaks(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """The most output chunks in one second of the run, and the most requests that overlapped one second."""
    if not outcomes:
        return 0.0, 0
    origin = min(o.started for o in outcomes)
    length = int(max(o.started - origin + o.latency for o in outcomes)) + 1
    tokens, open_requests = np.zeros(length), np.zeros(length, dtype=int)
    for o in outcomes:
        first = o.started - origin
        stamps = np.cumsum([first + o.ttft, *o.itls])
        # A chunk may carry several tokens; spread the server's count over the chunks that were seen.
        np.add.at(tokens, np.minimum(stamps.astype(int), length - 1), o.output_tokens / len(stamps))
        open_requests[int(first) : int(first + o.latency) + 1] += 1
    return float(tokens.max()), int(open_requests.max())
