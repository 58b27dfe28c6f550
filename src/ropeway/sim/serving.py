"""What a server adds to its engine, found from how a real one behaves under a few streams at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ropeway.errors import ConfigError
from ropeway.sim.profile import Profile, Serving


@dataclass(frozen=True)
class Level:
    """A server with `streams` streams at a time, each with `prompt` and `answer` tokens: the median time to the first
    token, and a typical gap between two, in seconds."""

    streams: int
    prompt: int
    answer: int
    ttft: float
    gap: float


def fit_serving(levels: Sequence[Level], profile: Profile, *, apart: bool) -> Serving:
    """The serving costs with which `profile` explains `levels`, of which the first has one stream.

    `apart` says that the engine leaves a core to the service. Then the service works on tokens while the engine
    computes the next ones, and is felt where its work takes longer than a step: a gap is then all its work on one token
    of each stream. Otherwise both share all cores, and its work lengthens the steps: what gaps last beyond the
    executor's steps is taken as the loop's, a constant and a part for each row. What the first token of a lone request
    takes beyond its step is the request's own. Raises ConfigError without any level.
    """
    import numpy as np

    if not levels:
        raise ConfigError("A server must be measured under at least one stream.")
    first, last = levels[0], levels[-1]
    rest = [max(0.0, level.gap - _decode(profile, level)) for level in levels]
    row, event = profile.serving.row, 0.0
    step = max(0.0, rest[0] - row)
    if apart:
        engine = _decode(profile, last) + step + row * last.streams
        event = last.gap / last.streams if last.gap > 1.05 * engine else 0.0
    elif len(levels) > 1:
        slope, constant = np.polyfit([level.streams for level in levels], rest, 1)
        row, step = max(float(slope), 0.0), max(float(constant), 0.0)
    request = max(0.0, first.ttft - _prefill(profile, first) - step - row - event)
    return dataclasses.replace(profile.serving, request=request, step=step, row=row, event=event)


def _decode(profile: Profile, level: Level) -> float:
    """A step in the middle of the answers."""
    context = level.streams * (level.prompt + level.answer // 2)
    return profile.cost.of(level.streams, context, level.streams)


def _prefill(profile: Profile, level: Level) -> float:
    n = level.prompt
    return profile.cost.of(n, n, 1, n * (n + 1) // 2 if n > 1 else 0, int(n > 1))
