"""Who comes when, asking what: synthetic traffic with the shapes of published traces.

Lengths are lognormal or mixtures of it, fitted to published percentiles; gaps are gamma distributed with a rate that
differs from minute to minute, as the traces' rates do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ropeway.contract import GenerateRequest, SamplingParams, Urgency
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Runs = tuple[tuple[int, int], ...]
"""Tokens as (token, how often): prompts that share a beginning have equal first runs."""

END = 1 << 31
"""The token that ends answers."""

_OWN = 1 << 32
"""Tokens from here on belong to one request each; those below are named by traces and common prompts."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: `at` is in seconds from the start. Its answer has `output_len` tokens, all of them `answer`; if the
    client allows more, `max_tokens`, the last one is `END`, and nobody knows beforehand how long it will be."""

    at: float
    prompt: Runs
    output_len: int
    answer: int = 0
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    ttft_deadline_s: float | None = None
    max_tokens: int | None = None
    urgency: Urgency = Urgency.HIGH

    @property
    def prompt_len(self) -> int:
        return sum(count for _, count in self.prompt)

    def request(self, rid: int) -> GenerateRequest:
        tokens: list[int] = []
        for token, count in self.prompt:
            tokens += [token] * count
        ends = self.max_tokens is not None and self.max_tokens > self.output_len
        sampling = SamplingParams(
            temperature=0.0, seed=self.answer, max_tokens=self.max_tokens or 0 if ends else self.output_len,
            min_tokens=self.output_len if ends else 0, ignore_eos=not ends,
        )  # fmt: skip
        return GenerateRequest(
            rid=rid, tokens=tokens, sampling=sampling, eos_ids=(END,) if ends else (), priority=self.priority,
            tenant=self.tenant, salt=self.tenant, deadline_s=self.deadline_s, ttft_deadline_s=self.ttft_deadline_s,
            urgency=self.urgency,
        )  # fmt: skip


def alone(at: float, prompt_len: int, output_len: int, number: int) -> Arrival:
    """A request that shares nothing with others. `number` is unique in its workload."""
    own = _OWN + 2 * number
    return Arrival(at, ((own, prompt_len),), output_len, own + 1)


def answer_of(number: int) -> int:
    """The token of the `number`-th request's answer."""
    return _OWN + 2 * number + 1


@dataclass(frozen=True)
class Lengths:
    """A mixture of lognormals, clipped to [1, `most`]: (share, median, sigma) of each."""

    parts: tuple[tuple[float, float, float], ...]
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        import numpy as np

        shares = np.array([part[0] for part in self.parts])
        which = rng.choice(len(self.parts), size=count, p=shares / shares.sum())
        medians, sigmas = np.array([p[1] for p in self.parts]), np.array([p[2] for p in self.parts])
        drawn = medians[which] * np.exp(sigmas[which] * rng.standard_normal(count))
        return [int(n) for n in np.clip(np.rint(drawn), 1, self.most)]


@dataclass(frozen=True)
class Shape:
    """`cv` is the coefficient of variation of gaps, `sigma` that of the logarithm of a minute's rate."""

    prompt: Lengths
    output: Lengths
    cv: float = 1.0
    sigma: float = 0.0


SHAPES = {
    # Azure LLM inference traces of 2023 (Patel et al., Splitwise, ISCA 2024).
    "azure-conv": Shape(
        Lengths(((1.0, 757, 0.99),), 14000),
        Lengths(((0.62, 90, 0.40), (0.355, 403, 0.075), (0.025, 550, 0.3)), 1500),
        1.09,
        0.25,
    ),
    "azure-code": Shape(Lengths(((1.0, 1469, 1.1),), 7600), Lengths(((1.0, 16.3, 0.85),), 2000), 6.9, 1.0),
    # BurstGPT (Wang et al. 2024): medians and 90th percentiles of the ChatGPT API.
    "burstgpt": Shape(Lengths(((1.0, 218, 1.79),), 16000), Lengths(((1.0, 26, 1.54),), 4000), 3.0, 0.5),
    # Means of ShareGPT as the vLLM paper gives them (Kwon et al., SOSP 2023): 161 and 338.
    "sharegpt": Shape(Lengths(((1.0, 98, 1.0),), 2048), Lengths(((1.0, 226, 0.9),), 2048)),
}
"""Shapes whose requests share nothing."""

WORKLOADS = (*SHAPES, "sessions", "poisson", "uniform")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What to generate. `input_len` and `output_len` are for `poisson` and `uniform`, whose requests are all equal."""

    workload: str = "poisson"
    count: int = 1000
    rate: float = 1.0
    input_len: int = 128
    output_len: int = 64
    tenants: int = 1
    seed: int = 0


def generate(traffic: Traffic) -> list[Arrival]:
    """Synthetic arrivals in order of time, at `rate` a second on average. Raises ConfigError."""
    import numpy as np

    if traffic.count < 1 or not traffic.rate > 0:
        raise ConfigError(f"{traffic.count} requests at {traffic.rate} a second are not a workload; use more than 0.")
    rng = np.random.default_rng(traffic.seed)
    if traffic.workload == "sessions":
        arrivals = _sessions(traffic, rng)
    else:
        arrivals = _unrelated(traffic, rng)
    return assign_tenants(arrivals, traffic.tenants, traffic.seed)


def _unrelated(traffic: Traffic, rng: np.random.Generator) -> list[Arrival]:
    if traffic.workload in ("poisson", "uniform"):
        even = traffic.workload == "uniform"
        gaps = [1.0 if even else float(rng.exponential()) for _ in range(traffic.count - 1)]
        times = _stretch([0.0, *_running_sum(gaps)], traffic)
        prompts, outputs = [traffic.input_len] * traffic.count, [traffic.output_len] * traffic.count
    else:
        shape = SHAPES.get(traffic.workload)
        if shape is None:
            raise ConfigError(f"workload {traffic.workload!r} is unknown; use one of {', '.join(WORKLOADS)}.")
        times = _bursty(shape, traffic, rng)
        prompts, outputs = shape.prompt.draw(rng, traffic.count), shape.output.draw(rng, traffic.count)
    return [alone(at, prompt, out, n) for n, (at, prompt, out) in enumerate(zip(times, prompts, outputs, strict=True))]


def _bursty(shape: Shape, traffic: Traffic, rng: np.random.Generator) -> list[float]:
    """Gamma gaps of mean 1/rate, walked through at a pace that changes every minute."""
    k = 1 / shape.cv**2
    # All but the first: how much work time until each arrival, in seconds at the mean rate.
    due = _running_sum(rng.gamma(k, 1 / (k * traffic.rate), size=traffic.count - 1))
    times, at, done, pace, minute = [0.0], 0.0, 0.0, 1.0, -1
    for moment in due:
        while True:
            if int(at // 60) != minute:
                minute = int(at // 60)
                pace = float(math.exp(shape.sigma * rng.standard_normal() - shape.sigma**2 / 2))
            left = (minute + 1) * 60 - at
            if done + left * pace >= moment:
                break
            done, at = done + left * pace, (minute + 1) * 60.0
        at += (moment - done) / pace
        done = moment
        times.append(at)
    return _stretch(times, traffic)


def _running_sum(gaps: Iterable[float]) -> list[float]:
    total, sums = 0.0, []
    for gap in gaps:
        total += float(gap)
        sums.append(total)
    return sums


def _stretch(times: list[float], traffic: Traffic) -> list[float]:
    """Exactly the rate asked for, which a sample would miss."""
    wanted = (traffic.count - 1) / traffic.rate
    return [at * wanted / times[-1] for at in times] if times[-1] > 0 else times


def _sessions(traffic: Traffic, rng: np.random.Generator) -> list[Arrival]:
    """Conversations: a system prompt that many share, and turns whose prompt is all that was said before and more.

    Turns are geometric with mean 4, think times lognormal with median 124 s (BurstGPT); system prompts have 512 to
    2,048 tokens and popularity by Zipf's law; a turn adds about what Mooncake's conversations do (Qin et al. 2024).
    """
    import numpy as np

    systems = [(n + 1, int(rng.integers(512, 2049))) for n in range(20)]
    popularity = np.arange(1, 21) ** -1.1
    popularity /= popularity.sum()
    turn, output = Lengths(((1.0, 900, 1.2),), 30000), Lengths(((1.0, 300, 0.6),), 2000)
    arrivals: list[Arrival] = []
    begins = 0.0
    while len(arrivals) < 4 * traffic.count:  # more than are asked for, so that the last ones are not all first turns
        begins += float(rng.exponential(4 / traffic.rate))
        turns = int(rng.geometric(0.25))
        history: Runs = (systems[int(rng.choice(20, p=popularity))],)
        at = begins
        for asked, answered in zip(turn.draw(rng, turns), output.draw(rng, turns), strict=True):
            number = len(arrivals)
            prompt = (*history, (_OWN + 2 * number, asked))
            arrivals.append(Arrival(at, prompt, answered, answer_of(number)))
            history = (*prompt, (answer_of(number), answered))
            at += float(np.clip(np.exp(math.log(124) + 1.9 * rng.standard_normal()), 1, 3600))
    arrivals.sort(key=lambda a: a.at)
    # From the middle, where conversations begin and go on at a steady rate.
    first = traffic.count
    chosen = arrivals[first : first + traffic.count]
    span = chosen[-1].at - chosen[0].at
    scale = (traffic.count - 1) / traffic.rate / span if span > 0 else 1.0
    return [dataclasses.replace(a, at=(a.at - chosen[0].at) * scale) for a in chosen]


def assign_tenants(arrivals: list[Arrival], tenants: int, seed: int) -> list[Arrival]:
    """Give each arrival one of `tenants`, of whom the n-th asks 1/n as often as the first. One tenant changes none."""
    if tenants < 2:
        return arrivals
    import numpy as np

    shares = 1 / np.arange(1, tenants + 1)
    drawn = np.random.default_rng(seed + 1).choice(tenants, size=len(arrivals), p=shares / shares.sum())
    return [dataclasses.replace(a, tenant=f"tenant-{n + 1}") for a, n in zip(arrivals, drawn, strict=True)]


def endless(arrivals: Sequence[Arrival]) -> Iterator[Arrival]:
    """The same again and again as background work that nobody waits for. Tokens differ each time, so that nothing is
    shared with an earlier one."""
    for turn in itertools.count(1):
        shift = turn << 44
        for a in arrivals:
            prompt = tuple((token + shift, count) for token, count in a.prompt)
            yield dataclasses.replace(
                a, at=0.0, prompt=prompt, answer=a.answer + shift, deadline_s=None, ttft_deadline_s=None,
                urgency=Urgency.LOW,
            )  # fmt: skip


def scale(arrivals: Sequence[Arrival], *, rate: float = 1.0, length: float = 1.0) -> list[Arrival]:
    """`rate` times as many a second, `length` times as long (at least one token of everything)."""

    if rate == length == 1:
        return [*arrivals]

    def shorter(count: int) -> int:
        return max(1, round(count * length))

    return [
        dataclasses.replace(
            a,
            at=a.at / rate,
            prompt=a.prompt if length == 1 else tuple((token, shorter(n)) for token, n in a.prompt),
            output_len=a.output_len if length == 1 else shorter(a.output_len),
        )
        for a in arrivals
    ]


def merge(*streams: Sequence[Arrival], rename: Callable[[int, Arrival], Arrival] = lambda n, a: a) -> list[Arrival]:
    """Several workloads at once. Tokens of different streams differ, so that nothing is shared between them."""

    def apart(number: int, arrival: Arrival) -> Arrival:
        shift = number << 40
        prompt = tuple((token + shift, count) for token, count in arrival.prompt)
        return rename(number, dataclasses.replace(arrival, prompt=prompt, answer=arrival.answer + shift))

    mixed = [apart(number, arrival) for number, stream in enumerate(streams) for arrival in stream]
    return sorted(mixed, key=lambda a: a.at)
