"""What a server adds to its executor, found from what its engine wrote down and what its clients saw meanwhile.

The journal says when the engine heard of each request, and when each step was done; clients on the same machine say, on
the same clock, when they sent a request and when they had its tokens. So each part is measured by itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from ropeway.errors import EngineError
from ropeway.sim.calibrate import least_deviation
from ropeway.sim.cost import CostModel
from ropeway.sim.profile import Serving
from ropeway.sim.served import Record, ServedStep

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PARTS = 50
"""Into how many parts of equal size jitter is divided."""

CROWD = 8
"""Requests sent at once that show what the service can take in."""


@dataclass(frozen=True)
class Level:
    """Traffic that a server was under: when its clients sent each request, had its first text, and had its last one, in
    seconds of the engine's clock; in any order."""

    name: str
    sent: list[float]
    first: list[float]
    last: list[float]


@dataclass(frozen=True)
class Part:
    """One part of a fit: how many `samples` it was fitted to, and how far off it is from them, in seconds (median)."""

    name: str
    samples: int
    off: float


def fit_serving(
    cost: CostModel, record: Record, levels: Sequence[Level], recorder: tuple[float, float] = (0.0, 0.0)
) -> tuple[Serving, list[Part]]:
    """What serving adds to steps that cost `cost`. `recorder` is what writing the journal took of each step, and of
    each of its rows, which a server without one does not spend. Raises EngineError if journal and clients disagree."""
    found = [_of(level, record) for level in levels]
    step, row, join, jitter, between = _between(cost, record.steps)
    wake, woken = _wake(cost, record.steps, jitter[1])
    request, arrive, prompt_token, arriving = _arrive(levels, found)
    busy, rushing = _arrive_busy(levels, found, request, arrive, prompt_token)
    deliver, deliver_row, deliver_jitter, delivering = _deliver(levels, found)
    serving = Serving(
        request=request, arrive=arrive, arrive_busy=busy, prompt_token=prompt_token, wake=max(0.0, wake - recorder[0]),
        step=max(0.0, step - recorder[0]), row=max(0.0, row - recorder[1]), join=join, deliver=deliver,
        deliver_row=deliver_row, jitter=jitter, deliver_jitter=deliver_jitter,
    )  # fmt: skip
    return serving, [arriving, rushing, woken, between, delivering]


def _of(level: Level, record: Record) -> Record:
    found = record.within(min(level.sent), max(level.last))
    if len(found.requests) != len(level.sent):
        raise EngineError(
            f"Clients sent {len(level.sent)} requests, but the engine's journal has {len(found.requests)} from then. "
            "Is somebody else using the server that is being measured?"
        )
    return found


def _between(
    cost: CostModel, steps: Sequence[ServedStep]
) -> tuple[float, float, float, tuple[tuple[float, ...], tuple[float, ...]], Part]:
    """What lies between steps while there is work: a constant, a part for each token told, and one for each request
    that joined. And what periods last beyond that and what their steps should cost. Short steps count as much as long
    ones, of which they are a larger share."""
    import numpy as np

    steps = [step for step in steps if not step.cold]
    if len(steps) < PARTS:
        raise EngineError(f"The server took {len(steps)} steps in a row, too few to see what lies between them.")
    rest = np.array([step.period - step.expected(cost) for step in steps])
    between = np.array([step.period - step.sample.seconds for step in steps])
    weights = 1 / np.array([step.sample.seconds for step in steps])
    matrix = np.array([[1.0, step.told, step.joined] for step in steps])
    found = least_deviation(matrix * weights[:, None], between * weights)
    left = rest - matrix @ found
    reads = np.array([step.reads for step in steps])
    jitter = _parts(left[~reads]), _parts(left[reads])
    part = Part("between", len(steps), float(np.median(np.abs(between - matrix @ found))))
    return float(found[0]), float(found[1]), float(found[2]), jitter, part


def _parts(values: NDArray[np.float64]) -> tuple[float, ...]:
    """The middles of `PARTS` equal parts of `values`, in order of size; to the microsecond."""
    import numpy as np

    if not len(values):
        return ()
    return tuple(round(float(value), 6) for value in np.quantile(values, (np.arange(PARTS) + 0.5) / PARTS))


def _wake(cost: CostModel, steps: Sequence[ServedStep], jitter: Sequence[float]) -> tuple[float, Part]:
    rest = [step.period - step.expected(cost) for step in steps if step.cold]
    if not rest:
        return 0.0, Part("wake", 0, 0.0)
    middle = median(rest)
    off = median(abs(one - middle) for one in rest)
    return max(0.0, middle - (median(jitter) if jitter else 0.0)), Part("wake", len(rest), off)


def _arrive(levels: Sequence[Level], found: Sequence[Record]) -> tuple[float, float, float, Part]:
    """The service's work on a request, the way from there, what each token of a prompt adds, and how good that is. Of
    requests that came to an engine at rest, which heard of them at once; the others waited for a step to end.

    What is work and what is waiting shows when many come at once: work comes one after the other.
    """
    delays: list[tuple[int, float]] = []
    work = float("inf")
    most = CROWD - 1
    for level, record in zip(levels, found, strict=True):
        sent, heard = sorted(level.sent), sorted(record.requests, key=lambda one: one.at)
        delays += [(one.prompt, one.at - at) for at, one in zip(sent, heard, strict=True) if one.idle]
        crowd = bisect_left(sent, min(level.first))
        if crowd > most:
            most, work = crowd, (heard[crowd - 1].at - heard[0].at) / (crowd - 1)
    if not delays:
        return 0.0, 0.0, 0.0, Part("arrive", 0, 0.0)
    slope = _slope(delays)
    way = max(0.0, median(delay - slope * prompt for prompt, delay in delays))
    off = median(abs(delay - slope * prompt - way) for prompt, delay in delays)
    work = min(work, way)
    return work, way - work, slope, Part("arrive", len(delays), off)


def _arrive_busy(
    levels: Sequence[Level], found: Sequence[Record], work: float, way: float, slope: float
) -> tuple[float, Part]:
    """What the way takes besides while the engine is at work, which hears of a request at the end of a step only: so
    much that, in the mean, requests would be heard of after the very steps after which they were. Of those for which
    the service was free."""
    came: list[tuple[float, float, list[float]]] = []  # the soonest it can be, the end of the step then, all of those
    for level, record in zip(levels, found, strict=True):
        ends, free = [step.done for step in record.steps], 0.0
        for at, one in zip(sorted(level.sent), sorted(record.requests, key=lambda one: one.at), strict=True):
            after, alone = bisect_right(ends, one.at), at >= free
            free = max(free, at) + work + slope * one.prompt
            if alone and not one.idle and after:
                came.append((free + way, ends[after - 1], ends))

    def late(more: float) -> list[float]:
        """By how much each would be heard of too late."""
        return [ends[min(bisect_left(ends, soonest + more), len(ends) - 1)] - end for soonest, end, ends in came]

    low, high = 0.0, 1.0
    if not came or fmean(late(low)) >= 0:
        return 0.0, Part("busy", len(came), median(map(abs, late(low))) if came else 0.0)
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if fmean(late(middle)) >= 0 else (middle, high)
    return high, Part("busy", len(came), median(map(abs, late(high))))


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Between the medians of the lower and the upper half, not negative (Tukey's resistant line, by halves)."""
    ordered = sorted(points)
    half = len(ordered) // 2
    low, high = ordered[:half], ordered[-half:]
    if not half or median(x for x, _ in high) - median(x for x, _ in low) < 16:
        return 0.0
    rise = median(y for _, y in high) - median(y for _, y in low)
    return max(0.0, rise / (median(x for x, _ in high) - median(x for x, _ in low)))


def _deliver(levels: Sequence[Level], found: Sequence[Record]) -> tuple[float, float, tuple[float, ...], Part]:
    """From the end of a step to the clients: a constant, a part for each token of the step, and what is left of that.
    Of first and of last tokens, which clients get in the order in which they were made."""
    import numpy as np

    rows: list[int] = []
    delays: list[float] = []
    for level, record in zip(levels, found, strict=True):
        firsts = sorted((one.first, one.first_rows) for one in record.requests)
        lasts = sorted((one.last, one.last_rows) for one in record.requests)
        for seen, made in ((level.first, firsts), (level.last, lasts)):
            rows += [count for _, count in made]
            delays += [at - done for at, (done, _) in zip(sorted(seen), made, strict=True)]
    matrix, target = np.array([[1.0, count] for count in rows]), np.array(delays)
    constant, each = (float(value) for value in least_deviation(matrix, target, near=1e-4))
    left = target - constant - each * matrix[:, 1]
    return constant, each, _parts(left), Part("deliver", len(delays), float(np.median(np.abs(left))))
