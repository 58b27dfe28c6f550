"""What a comparison of two arms says, as data and as a table."""

from __future__ import annotations

from msgspec import Struct


class Measure(Struct, frozen=True, kw_only=True):
    """One measure of both arms. `improvement_percent` is that of the averages, above 0 where the canary is faster;
    `typical_percent` is that of the typical (geometric mean) time, which a few long answers do not carry away, and
    stands within `low_percent` and `high_percent`. Null where there are too few answers to tell."""

    control_samples: int
    canary_samples: int
    control_avg_ms: float | None
    canary_avg_ms: float | None
    control_p95_ms: float | None
    canary_p95_ms: float | None
    improvement_percent: float | None
    typical_percent: float | None
    low_percent: float | None
    high_percent: float | None


class Errors(Struct, frozen=True, kw_only=True):
    """Answers that failed, of a hundred. `increase_percent` is the canary's less the control's, in points."""

    control_samples: int
    canary_samples: int
    control_percent: float
    canary_percent: float
    increase_percent: float | None
    low_percent: float | None
    high_percent: float | None


class Analysis(Struct, frozen=True, kw_only=True):
    """What is known of two arms. All intervals hold together, for ever, with `confidence_percent`. A mean is judged by
    keys: `control_keys` is to how many keys of equal weight the control's answers amount."""

    latency: Measure
    ttft: Measure
    itl: Measure
    errors: Errors
    confidence_percent: float
    control_keys: float
    canary_keys: float

    def __str__(self) -> str:
        """A table: what each arm takes on average, and by how much the canary is better."""
        lines = [
            f"control_samples {self.errors.control_samples:,}  canary_samples {self.errors.canary_samples:,}",
            f"{'':9}{'control_avg':>14}{'canary_avg':>14}{'improvement':>14}  of the typical answer",
        ]
        for name, row in (("latency", self.latency), ("ttft", self.ttft), ("itl", self.itl)):
            averages = _cell(row.control_avg_ms, "ms") + _cell(row.canary_avg_ms, "ms")
            interval = _interval(row.typical_percent, row.low_percent, row.high_percent, "%")
            lines.append(f"{name:9}{averages}{_cell(row.improvement_percent, '%')}  {interval}")
        errors = self.errors
        rates = _cell(errors.control_percent, "%") + _cell(errors.canary_percent, "%")
        interval = _interval(errors.increase_percent, errors.low_percent, errors.high_percent, "points")
        lines.append(f"{'errors':9}{rates}{'':14}  {interval}")
        confidence = f"{self.confidence_percent:.4g} %"
        lines.append(f"All intervals hold together, however often one looks, with {confidence} confidence.")
        return "\n".join(lines)


def _cell(value: float | None, unit: str) -> str:
    return f"{'-' if value is None else f'{value:,.1f} {unit}':>14}"


def _interval(middle: float | None, low: float | None, high: float | None, unit: str) -> str:
    if middle is None or low is None or high is None:
        return "too few answers to tell"
    return f"{middle:+.1f} {unit} ({low:+.1f} to {high:+.1f})"
