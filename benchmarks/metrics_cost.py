"""What metrics cost an engine: the same requests through one executor, by turns bare and with all that observes it: the
watcher around the engine, every metric, and the statistics line.

    python benchmarks/metrics_cost.py [--model bundled] [--rows 64] [--rounds 20]

Engine, metrics and model share one thread here, which is the worst case: in a server the metrics are another process's.
Printed are seconds of a run and their ratio, pair by pair so that a machine that changes its pace changes both; then
what a step's news costs alone, as a share of the step. Of a server's log nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time

from ropeway.config import EngineConfig
from ropeway.contract import Command, GenerateRequest, Ready, Report, SamplingParams, Step, Submit
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine
from ropeway.observe.logs import StatsLine
from ropeway.observe.metrics import Metrics
from ropeway.runtime.open import open_executor
from ropeway.scene.watcher import Watcher


class Service:
    """A channel that asks once, and hears until all is done. `metrics` hear too, unless that is None."""

    def __init__(self, commands: list[Command], metrics: Metrics | None) -> None:
        line = StatsLine(10.0)
        self._commands: list[Command] | None = commands
        self._listeners = [] if metrics is None else [metrics.on_report, line.on_report]
        self._open = len(commands)
        self.news: list[Step] = []

    def recv(self, *, wait: bool) -> list[Command] | None:
        if not self._open:
            return None
        found, self._commands = self._commands or [], None
        return found

    def send(self, report: Report) -> None:
        for listener in self._listeners:
            listener(report)
        if isinstance(report, Step):
            self._open -= sum([event.finish is not None for event in report.events])
            self.news.append(report)


class Pair:
    """An engine that is observed in every other run."""

    def __init__(self, config: EngineConfig, executor: Executor, rows: int, tokens: int) -> None:
        self._engine, self._executor = Engine(executor, config), executor
        self._rows, self._tokens = rows, tokens
        self._numbers = itertools.count(1)
        self.metrics = Metrics("m", blocks=True)

    def run(self, observed: bool) -> tuple[float, list[Step]]:
        """Seconds of a run, and its news."""
        sampling = SamplingParams(temperature=0.0, max_tokens=self._tokens, ignore_eos=True)
        commands: list[Command] = [
            Submit(GenerateRequest(rid=rid, tokens=[5 + rid % 91] * 16, sampling=sampling))
            for rid in itertools.islice(self._numbers, self._rows)
        ]
        service = Service(commands, self.metrics if observed else None)
        watcher = Watcher(self._executor, sample=0.01)
        self._engine.executor = watcher if observed else self._executor
        begun = time.perf_counter()
        if observed:
            watcher.run(self._engine, service)
        else:
            self._engine.run(service)
        return time.perf_counter() - begun, service.news


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="directory or hub name")
    parser.add_argument("--rows", type=int, default=64, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of runs")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    config = EngineConfig(model=options.model, max_num_seqs=options.rows, enable_prefix_caching=False)
    executor = open_executor(config)
    try:
        measure(Pair(config, executor, options.rows, options.tokens), executor, options.rounds)
    finally:
        executor.close()


def measure(pair: Pair, executor: Executor, rounds: int) -> None:
    news: list[Step] = []
    pair.run(False)
    pair.run(True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for observed in (False, True) if number % 2 else (True, False):
            seconds, news = pair.run(observed)
            times[observed].append(seconds)
    ratios = sorted(seen / bare for bare, seen in zip(times[False], times[True], strict=True))
    bare, seen = (statistics.median(times[observed]) for observed in (False, True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(
        f"{bare:.3f} s bare, {seen:.3f} s observed; ratio {statistics.median(ratios):.4f}, "
        f"half of {rounds} pairs from {low:.4f} to {high:.4f}"
    )
    alone = Metrics("m")
    alone.on_report(Ready(executor.info))
    costs = []
    for report in news:
        begun = time.perf_counter()
        alone.on_report(report)
        costs.append(time.perf_counter() - begun)
    steps = [report.stats.step_seconds for report in news if report.stats.step_tokens]
    cost, step = statistics.median(costs), statistics.median(steps)
    print(f"a step's news: {cost * 1e6:.1f} µs of metrics, {cost / step:.2%} of the executor's {step * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
