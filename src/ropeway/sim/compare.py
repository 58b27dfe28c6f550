"""Static against continuous batching, ride by ride: for pictures, and small enough to be asked for over HTTP.

As a program it reads a `Mix` from its input and writes the `Comparison`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import resource
import sys

import msgspec

from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo, StepPlan, StepResult
from ropeway.contract.compare import MAX_ANSWER, MAX_PROMPT, Comparison, Mix, Ride, Side
from ropeway.sim.clock import VirtualClock
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.report import Targets, report
from ropeway.sim.simulate import simulate
from ropeway.sim.timed import TimedExecutor
from ropeway.sim.workload import Arrival, alone

CPU_SECONDS = 30
"""What the program may take of a processor before the kernel ends it."""


class Seats:
    """An executor that writes down who boards which seat, and how long seats compute."""

    def __init__(self, inner: TimedExecutor, clock: VirtualClock) -> None:
        self.boarded: dict[int, tuple[int, float]] = {}
        """Seat and time by request."""
        self.computing = 0.0
        """Seconds, summed over the rows of all steps."""
        self.seconds = 0.0
        self._inner = inner
        self._clock = clock
        self._rows = 0

    @property
    def info(self) -> ExecutorInfo:
        return self._inner.info

    def submit(self, plan: StepPlan) -> int:
        for admit in plan.admit:
            self.boarded.setdefault(admit.rid, (admit.slot, self._clock.now()))
        self._rows = len(plan.rows)
        return self._inner.submit(plan)

    def collect(self, ticket: int) -> StepResult:
        begun = self._clock.now()
        result = self._inner.collect(ticket)
        took = self._clock.now() - begun
        self.seconds += took
        self.computing += took * self._rows
        return result

    def close(self) -> None:
        self._inner.close()


def arrivals_of(mix: Mix) -> list[Arrival]:
    """The requests of `mix`, in order of time. How long an answer gets nobody knows before it ends."""
    rng = random.Random(mix.seed)
    found, at = [], 0.0
    for number in range(mix.requests):
        prompt = _length(rng, mix.prompt_tokens, mix.spread, MAX_PROMPT)
        answer = _length(rng, mix.answer_tokens, mix.spread, MAX_ANSWER)
        one = alone(at, prompt, answer, number)
        found.append(dataclasses.replace(one, max_tokens=MAX_ANSWER + 1))
        at += rng.expovariate(mix.rate) if mix.rate else 0.0
    return found


def _length(rng: random.Random, mean: int, spread: float, most: int) -> int:
    median = mean * math.exp(-(spread**2) / 2)
    return max(1, min(most, round(median * math.exp(spread * rng.gauss(0.0, 1.0)))))


def compare(mix: Mix) -> Comparison:
    """Serve the requests of `mix` both ways. What a service adds before the engine hears of a request is left out: it
    would make the first static batch one of a single request, which is nobody's idea of static batching."""
    profile, arrivals = load_profile(mix.profile), arrivals_of(mix)
    bare = dataclasses.replace(profile.serving, request=0.0, prompt_token=0.0, arrive=0.0, arrive_busy=0.0)
    profile = dataclasses.replace(profile, serving=bare)
    config = EngineConfig(max_num_seqs=mix.seats, max_queue=mix.requests + 1, scheduling_policy="fcfs")
    return Comparison(
        machine=profile.machine,
        model=profile.model,
        basis=profile.basis,
        seats=mix.seats,
        static=_side(arrivals, profile, dataclasses.replace(config, batching="static")),
        continuous=_side(arrivals, profile, config),
    )


def _side(arrivals: list[Arrival], profile: Profile, config: EngineConfig) -> Side:
    watched: list[Seats] = []

    def watch(inner: TimedExecutor, clock: VirtualClock) -> Seats:
        watched.append(Seats(inner, clock))
        return watched[0]

    run = simulate(arrivals, profile, config, watch=watch)
    found, [seats] = report(run, Targets(math.inf, math.inf)), watched
    rides = []
    for rid, outcome in enumerate(run.outcomes):
        arrival, (seat, boarded) = outcome.arrival, seats.boarded[rid]
        times = arrival.at, boarded, arrival.at + (outcome.first or 0.0), arrival.at + (outcome.last or 0.0)
        arrived, boarded, first, last = (round(time, 6) for time in times)
        ride = Ride(
            seat=seat, arrived=arrived, boarded=boarded, first=first, last=last, prompt=arrival.prompt_len,
            answer=outcome.output_len,
        )  # fmt: skip
        rides.append(ride)
    return Side(
        seconds=found.seconds,
        steps=found.steps,
        output_rate=found.output_rate,
        occupancy=min(1.0, seats.computing / (seats.seconds * config.max_num_seqs)) if seats.seconds else 0.0,
        ttft_p50=found.ttft["p50"],
        ttft_p99=found.ttft["p99"],
        e2e_mean=found.e2e["mean"],
        e2e_p99=found.e2e["p99"],
        rides=rides,
    )


def main() -> None:
    """One comparison within a limit of time, behind everything else that the machine does."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.nice(10)
    mix = msgspec.json.decode(sys.stdin.buffer.read(), type=Mix)
    sys.stdout.buffer.write(msgspec.json.encode(compare(mix)))


if __name__ == "__main__":
    main()
