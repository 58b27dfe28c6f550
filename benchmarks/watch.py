"""What watching costs: microseconds of the engine's own part of a step while a batch decodes, bare, watched with nobody
looking, and what one look takes on top. With --live, tokens a second of a real server (the bundled model, 64 rows), and
the processor time of server and engine for each, by turns with and without somebody who watches. Processor time can be
trusted beside other programs too.

    python benchmarks/watch.py [--live] [--rounds N] [ROWS ...]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence

import httpx2
import psutil
from instant import Instant, asks, decoding

from ropeway.bench.spawn import serving
from ropeway.contract import Command, Report
from ropeway.contract.codec import encode
from ropeway.contract.scene import Look, Scene
from ropeway.engine.engine import Engine
from ropeway.scene.watcher import Watcher

STEPS = 400
ROUNDS = 15
"""In turn unwatched and watched; the cost is the median of the differences."""
EVERY = 0.25
"""Seconds between two looks of a feed."""


class Service:
    """A channel that has everybody decode while time is taken: `times` are those of steps, `look` that of one scene."""

    def __init__(self, commands: list[Command], look_at: int) -> None:
        self._commands = commands
        self._look_at = look_at
        self._steps = 0
        self._since = 0.0
        self.times: list[float] = []
        self.look = 0.0
        self.bytes = 0

    def recv(self, *, wait: bool) -> list[Command] | None:
        now = time.perf_counter()
        if self._since:
            self.times.append(now - self._since)
        self._steps += 1
        if self._steps > STEPS:
            return None
        found, self._commands = self._commands, []
        if self._steps == self._look_at:
            found = [*found, Look(1)]
        self._since = time.perf_counter()
        return found

    def send(self, report: Report) -> None:
        if isinstance(report, Scene):
            begun = time.perf_counter()
            self.bytes = len(encode(report))
            self.look = report.took + time.perf_counter() - begun


def measure(rows: int, watch: bool) -> tuple[float, float, int]:
    """Seconds of a step (the median) and of a look, and a scene's bytes."""
    executor = Instant(rows)
    watcher = Watcher(executor)
    engine = Engine(watcher if watch else executor, decoding(rows))
    service = Service(asks(rows), STEPS // 2 if watch else -1)
    if watch:
        watcher.run(engine, service)
    else:
        engine.run(service)
    return statistics.median(service.times[20:]), service.look, service.bytes


async def live(url: str, rounds: int, rows: int, tokens: int = 250) -> None:
    """Beside the server at `url`, the only child of this process."""
    server = psutil.Process().children()[0]
    family = [server, *server.children(recursive=True)]
    figures: dict[str, dict[bool, list[float]]] = {
        what: {False: [], True: []} for what in ("tokens/s", "server's seconds a token", "engine's seconds a token")
    }
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=None)) as http:
        for number in range(rounds + 1):
            for watched in (False, True) if number % 2 else (True, False):
                watching = asyncio.create_task(_watch(http)) if watched else None
                begun, used = time.perf_counter(), _processor(family)
                await asyncio.gather(*(_ask(http, f"{number} {watched} {row}", tokens) for row in range(rows)))
                if number:  # the first is to warm up
                    pace = rows * tokens / (time.perf_counter() - begun)
                    server_s, engine_s = _processor(family)
                    spent = ((server_s - used[0]) / rows / tokens, (engine_s - used[1]) / rows / tokens)
                    for found, figure in zip(figures.values(), (pace, *spent), strict=True):
                        found[watched].append(figure)
                if watching is not None:
                    assert not watching.done(), watching
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
    for what, found in figures.items():
        shares = [seen / bare for bare, seen in zip(found[False], found[True], strict=True)]
        bare, seen = (statistics.median(found[watched]) for watched in (False, True))
        spread = f"of {rounds} pairs from {min(shares):.4f} to {max(shares):.4f}"
        print(f"{what}: {bare:,.6g} unwatched, {seen:,.6g} watched, ratio {statistics.median(shares):.4f}, {spread}")


def _processor(family: list[psutil.Process]) -> tuple[float, float]:
    """Seconds that the server itself has used, and the largest of its children, which has the engine."""
    server, *children = (sum(process.cpu_times()[:2]) for process in family)
    return server, max(children)


async def _ask(http: httpx2.AsyncClient, prompt: str, tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def _watch(http: httpx2.AsyncClient) -> None:
    async with http.stream("GET", f"/ui/feed?every={EVERY}") as response:
        assert response.status_code == 200, response
        async for _ in response.aiter_bytes():
            pass


def table(sizes: Sequence[int]) -> None:
    print(
        f"{'rows':>6} {'bare':>9} {'watched':>9} {'cost':>9} {'a look':>9} {'bytes':>7}   share of time with 4 a second"
    )
    for rows in sizes:
        found = [(measure(rows, False)[0], *measure(rows, True)) for _ in range(ROUNDS)]
        bare, seen, look, size = (statistics.median(figures) for figures in zip(*found, strict=True))
        cost = statistics.median(watched - unwatched for unwatched, watched, *_ in found)
        times = f"{bare * 1e6:>6.0f} µs {seen * 1e6:>6.0f} µs {cost * 1e6:>6.1f} µs {look * 1e6:>6.0f} µs"
        print(f"{rows:>6} {times} {size:>7,.0f}   {look / EVERY:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, help="sequences on board (1, 16, 64 and 256; live 64)")
    parser.add_argument("--live", action="store_true", help="with the bundled model, over HTTP: minutes")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of live runs, with and without a watcher")
    options = parser.parse_args()
    if options.live:
        for rows in options.rows or [64]:
            with serving("bundled", ["--max-num-seqs", str(rows)]) as url:
                asyncio.run(live(url, options.rounds, rows))
    else:
        table(options.rows or [1, 16, 64, 256])


if __name__ == "__main__":
    main()
