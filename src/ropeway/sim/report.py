"""From a simulated run to numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropeway.contract import FinishReason
from ropeway.sim.simulate import Outcome, Run


@dataclass(frozen=True)
class Targets:
    """What clients want: the first token within `ttft` seconds, and tokens at most `gap` seconds apart on average."""

    ttft: float
    gap: float

    def met(self, outcome: Outcome) -> bool:
        return outcome.ok and outcome.first is not None and outcome.first <= self.ttft and outcome.pace <= self.gap


@dataclass(frozen=True, kw_only=True)
class Report:
    """Times are in seconds. Latencies are of requests that finished; a client's wait counts from when it asked.

    `goodput` is the share of all requests, refused ones included, that met both targets. `fairness` is Jain's index
    over tenants of the tokens that a tenant got per second that its requests were there: 1 if all were served at one
    pace. `wasted` counts tokens that were computed but are in no finished answer: again after a preemption, or for
    requests that were given up. `computed_rate` is the tokens a second that were computed in all, those of a backlog
    included. `hit_rate` is the share of prompt tokens that the prefix cache had. `busy` is the share
    of time that steps took. `backlog` is how many requests of a backlog have finished; nothing else is about those.
    """

    requests: int
    finished: int
    rejected: int
    timed_out: int
    seconds: float
    ttft: Mapping[str, float]
    gap: Mapping[str, float]
    e2e: Mapping[str, float]
    request_rate: float
    output_rate: float
    total_rate: float
    goodput: float
    goodput_rate: float
    fairness: float
    preemptions: int
    preempted: int
    wasted: int
    hit_rate: float
    busy: float
    steps: int
    computed_rate: float
    backlog: int

    def fields(self) -> dict[str, Any]:
        """As JSON; times in milliseconds, named as `ropeway bench serve` names them."""
        found = {name: value for name, value in vars(self).items() if not isinstance(value, Mapping)}
        for metric, spread in (("ttft", self.ttft), ("itl", self.gap), ("e2el", self.e2e)):
            found |= {f"{name}_{metric}_ms": 1000 * value for name, value in spread.items()}
        return found


def report(run: Run, targets: Targets) -> Report:
    """All numbers of `run`."""
    done = [o for o in run.outcomes if o.ok]
    met = sum(targets.met(o) for o in run.outcomes)
    seconds = run.seconds or 1e-9
    output = sum(o.output_len for o in done)
    prompts = sum(o.arrival.prompt_len for o in done)
    cached = sum(o.cached for o in done)
    beside = [o for o in run.backlog if o.ok]
    # The last token of an answer is never computed.
    useful = prompts - cached + output - len(done)
    useful += sum(o.arrival.prompt_len - o.cached + o.output_len - 1 for o in beside)
    return Report(
        requests=len(run.outcomes),
        finished=len(done),
        rejected=sum(o.finish is FinishReason.REJECTED for o in run.outcomes),
        timed_out=sum(o.finish is FinishReason.TIMEOUT for o in run.outcomes),
        seconds=run.seconds,
        ttft=_spread([o.first or 0.0 for o in done]),
        gap=_spread(run.gaps, run.gap_counts),
        e2e=_spread([o.last or 0.0 for o in done]),
        request_rate=len(done) / seconds,
        output_rate=output / seconds,
        total_rate=(prompts + output) / seconds,
        goodput=met / max(1, len(run.outcomes)),
        goodput_rate=met / seconds,
        fairness=jain(list(_paces(done).values())),
        preemptions=sum(o.preemptions for o in run.outcomes),
        preempted=sum(o.preemptions > 0 for o in run.outcomes),
        wasted=run.computed - useful,
        hit_rate=cached / max(1, prompts),
        busy=run.busy / seconds / run.replicas,
        steps=run.steps,
        computed_rate=run.computed / seconds,
        backlog=len(beside),
    )


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index (1984): 1 if all are equal, 1/n if one has everything."""
    total, squares = sum(shares), sum(share * share for share in shares)
    return total * total / (len(shares) * squares) if squares > 0 else 1.0


def _paces(outcomes: Sequence[Outcome]) -> dict[str, float]:
    tokens, seconds = defaultdict[str, float](float), defaultdict[str, float](float)
    for o in outcomes:
        tokens[o.arrival.tenant] += o.output_len
        seconds[o.arrival.tenant] += o.last or 0.0
    return {tenant: tokens[tenant] / seconds[tenant] for tenant in tokens if seconds[tenant] > 0}


def _spread(values: Sequence[float], counts: Sequence[int] | None = None) -> dict[str, float]:
    """Mean, percentiles and maximum; `counts` says how often each value occurred."""
    import numpy as np

    found = np.asarray(values, dtype=float)
    if not len(found):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 0.0)
    if counts is None:
        at = {f"p{p}": float(np.percentile(found, p)) for p in (50, 90, 99)}
        return {"mean": float(found.mean()), **at, "max": float(found.max())}
    weights = np.asarray(counts, dtype=float)
    order = np.argsort(found, kind="stable")
    reached = np.cumsum(weights[order])
    at = {
        f"p{p}": float(found[order[min(int(np.searchsorted(reached, p / 100 * reached[-1])), len(order) - 1)]])
        for p in (50, 90, 99)
    }
    return {"mean": float(np.average(found, weights=weights)), **at, "max": float(found.max())}


_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("TTFT mean", "ttft.mean", 1e3, 0),
    ("p50", "ttft.p50", 1e3, 0),
    ("p99", "ttft.p99", 1e3, 0),
    ("max", "ttft.max", 1e3, 0),
    ("gap p50", "gap.p50", 1e3, 1),
    ("p99", "gap.p99", 1e3, 1),
    ("E2E mean", "e2e.mean", 1, 2),
    ("p99", "e2e.p99", 1, 2),
    ("out tok/s", "output_rate", 1, 0),
    ("req/s", "request_rate", 1, 2),
    ("goodput", "goodput", 100, 1),
    ("Jain", "fairness", 1, 3),
    ("refused", "rejected", 1, 0),
    ("preempt", "preemptions", 1, 0),
    ("wasted", "wasted", 1, 0),
    ("hits", "hit_rate", 100, 1),
    ("busy", "busy", 100, 0),
)


def table(rows: Sequence[tuple[str, Report]]) -> str:
    """Runs side by side as plain text: TTFT and gaps in ms, E2E in s, goodput, hits and busy in %."""
    head = max(12, *(len(label) for label, _ in rows))
    cells = [[_cell(found, path, unit, digits) for _, path, unit, digits in _COLUMNS] for _, found in rows]
    widths = [max(len(name), *(len(row[n]) for row in cells)) for n, (name, *_) in enumerate(_COLUMNS)]
    lines = [" ".join([" " * head, *(name.rjust(w) for (name, *_), w in zip(_COLUMNS, widths, strict=True))])]
    for (label, _), row in zip(rows, cells, strict=True):
        lines.append(" ".join([label.ljust(head), *(cell.rjust(w) for cell, w in zip(row, widths, strict=True))]))
    return "\n".join(lines)


def _cell(found: Report, path: str, unit: float, digits: int) -> str:
    name, _, part = path.partition(".")
    value = getattr(found, name)
    return f"{(value[part] if part else value) * unit:,.{digits}f}"
