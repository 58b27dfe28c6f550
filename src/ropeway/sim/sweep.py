"""Many simulations over a grid of settings, and what follows from them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway import config as configuration
from ropeway.config import EngineConfig, Setting, settings
from ropeway.errors import ConfigError
from ropeway.sim import config as sim_configuration
from ropeway.sim.config import OBEYED, SimConfig
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.report import Report, report
from ropeway.sim.simulate import Run, capacity, simulate
from ropeway.sim.traces import read_trace
from ropeway.sim.workload import Arrival, Traffic, endless, generate, scale

MOST_POINTS = 200


@dataclass(frozen=True)
class Point:
    """One simulation: what was varied, and what came of it."""

    varied: Mapping[str, Any]
    engine: EngineConfig
    sim: SimConfig
    profile: Profile
    run: Run
    report: Report
    rate: float

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={_text(value)}" for name, value in self.varied.items()) or "run"

    @property
    def cost_per_hour(self) -> float | None:
        price = self.profile.price_per_hour if self.sim.price_per_hour is None else self.sim.price_per_hour
        return None if price is None else price * self.sim.replicas


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_sweeps(items: Sequence[str]) -> dict[str, list[Any]]:
    """`["scheduling_policy=fcfs,sjf", "replicas=1,2"]` as values by setting. Raises ConfigError."""
    obeyed = {*SimConfig.__dataclass_fields__, *OBEYED}
    known = {s.name: s for s in settings(SimConfig, EngineConfig) if s.name in obeyed}
    sweeps: dict[str, list[Any]] = {}
    for item in items:
        name, separator, values = item.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        words = [word.strip() for word in values.split(",") if word.strip()]
        if name not in known or not separator or not words:
            raise ConfigError(
                f"--sweep is {item!r}; it must be SETTING=VALUE,VALUE with a setting that `ropeway sim --help` lists.",
                param="sweep",
            )
        sweeps[name] = [_parse(known[name], word) for word in words]
    points = 1
    for found in sweeps.values():
        points *= len(found)
    if points > MOST_POINTS:
        raise ConfigError(
            f"The sweep has {points} combinations; {MOST_POINTS} are the most. Leave values out.", param="sweep"
        )
    return sweeps


def _parse(setting: Setting, word: str) -> Any:
    return None if word == "none" and setting.default is None else setting.parse(word, f"{setting.name} in --sweep")


def run_sweep(
    sim: SimConfig,
    engine: EngineConfig,
    sweeps: Mapping[str, Sequence[Any]],
    progress: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Simulate every combination. Raises ConfigError if one of them cannot be."""
    points = []
    sources = _Sources()
    for values in itertools.product(*sweeps.values()):
        varied = dict(zip(sweeps, values, strict=True))
        own = {name: value for name, value in varied.items() if name in SimConfig.__dataclass_fields__}
        chosen_sim = sim_configuration.check(dataclasses.replace(sim, **own))
        rest = {name: value for name, value in varied.items() if name not in own}
        chosen_engine = configuration.check(dataclasses.replace(engine, **rest))
        profile = load_profile(chosen_sim.profile)
        arrivals, rate = sources.arrivals(chosen_sim, chosen_engine, profile)
        run = simulate(
            arrivals,
            profile,
            chosen_engine,
            replicas=chosen_sim.replicas,
            balance=chosen_sim.balance,
            backlog=endless(arrivals) if chosen_sim.backlog else (),
        )
        found = report(run, chosen_sim.targets)
        points.append(Point(varied, chosen_engine, chosen_sim, profile, run, found, rate))
        progress(points[-1])
    return points


class _Sources:
    """Arrivals for each combination. Traffic and capacity are found once where combinations share them: a load is a
    share of what the settings that a sweep begins with can do, so that policies are compared under equal traffic."""

    def __init__(self) -> None:
        self._traffic: dict[Any, list[Arrival]] = {}
        self._capacity: dict[Any, float] = {}

    def arrivals(self, sim: SimConfig, engine: EngineConfig, profile: Profile) -> tuple[list[Arrival], float]:
        key = (sim.workload, sim.trace, sim.num_requests, sim.length_scale, sim.input_len, sim.output_len, sim.tenants,
               sim.seed, sim.ttft_target_ms, sim.max_tokens)  # fmt: skip
        if key not in self._traffic:
            within = sim.targets.ttft
            self._traffic[key] = [
                dataclasses.replace(a, ttft_deadline_s=a.ttft_deadline_s or within, max_tokens=sim.max_tokens)
                for a in scale(_traffic(sim), length=sim.length_scale)
            ]
        arrivals = self._traffic[key]
        natural = len(arrivals) / arrivals[-1].at if arrivals[-1].at > 0 else float("inf")
        load = 0.8 if sim.load is None and sim.rate is None and sim.trace is None else sim.load
        if load is not None:
            at_most = (key, sim.profile, sim.replicas)
            if at_most not in self._capacity:
                self._capacity[at_most] = capacity(arrivals, profile, engine, replicas=sim.replicas)
            wanted = load * self._capacity[at_most]
        else:
            wanted = natural if sim.rate is None else sim.rate
        wanted *= sim.rate_scale
        return scale(arrivals, rate=wanted / natural), wanted


def _traffic(sim: SimConfig) -> list[Arrival]:
    if sim.trace is not None:
        return read_trace(Path(sim.trace), sim.num_requests)
    return generate(
        Traffic(
            workload=sim.workload, count=1000 if sim.num_requests is None else sim.num_requests, rate=1.0,
            input_len=sim.input_len, output_len=sim.output_len, tenants=sim.tenants, seed=sim.seed,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """`point` is the choice; `met` whether it reaches the targets."""

    point: Point
    met: bool

    def __str__(self) -> str:
        point, found = self.point, self.point.report
        sim = point.sim
        flags = " ".join(_flags(point)) or "the given settings"
        servers = f"{sim.replicas} replica{'s' if sim.replicas > 1 else ''}"
        cost = "" if point.cost_per_hour is None else f", {point.cost_per_hour:,.2f} an hour"
        got = (
            f"{100 * found.goodput:.1f} % of requests within {sim.ttft_target_ms:g} ms to the first token and "
            f"{sim.gap_target_ms:g} ms a token (TTFT p99 {1000 * found.ttft['p99']:,.0f} ms)"
        )
        traffic = f"For {point.rate:.3g} requests/s of this traffic"
        if self.met:
            return f"{traffic}: {flags}, {servers}{cost}. That gives {got}."
        return (
            f"{traffic} nothing that was tried meets the targets for {100 * sim.attain:g} % of requests. Best: "
            f"{flags}, {servers}{cost}, with {got}. Try more replicas, less load, or looser targets."
        )


def _flags(point: Point) -> Iterator[str]:
    """The engine's settings that were varied, as `ropeway serve` takes them."""
    for setting in settings(EngineConfig):
        if setting.name in point.varied:
            value = point.varied[setting.name]
            if setting.kind is bool:
                yield setting.flag if value else setting.flag.replace("--", "--no-", 1)
            elif value is not None:
                yield f"{setting.flag} {_text(value)}"


def recommend(points: Sequence[Point]) -> Recommendation:
    """The cheapest that meets the targets; among equally cheap ones the one with most requests within them, then the
    lowest TTFT. If none meets them, the one that comes closest. `points` is not empty."""

    def met(point: Point) -> bool:
        return point.report.goodput >= point.sim.attain

    def cost(point: Point) -> tuple[float, ...]:
        price = point.cost_per_hour
        return (float(point.sim.replicas) if price is None else price, -point.report.goodput, point.report.ttft["mean"])

    enough = [point for point in points if met(point)]
    if enough:
        return Recommendation(min(enough, key=cost), True)
    return Recommendation(max(points, key=lambda p: (p.report.goodput, -p.sim.replicas, -p.report.ttft["mean"])), False)
