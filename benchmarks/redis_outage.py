"""What an outage of Redis does to chat on a server that shares background work over it.

    python benchmarks/redis_outage.py [MODEL] [--rate 20] [--seconds 20] [--rounds 3]

A server with a Redis of its own answers short chats that arrive at random at a fixed mean rate, while deferred requests
trickle in beside them. Redis is there for a while, then it is away for as long, and so on in turn: frozen (it takes
connections and says nothing), gone, or flapping between the two every second. Printed are the times of chats before
and during each kind of outage, from the moment at which they were due, and by how much the p99 of an outage differs
from that of the stretch before it: the middle of all such pairs, with a bootstrapped 95 % interval, because whatever
else disturbs the machine disturbs many chats in a row. Needs redis-server. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import httpx2
import numpy as np

from ropeway.bench.spawn import serving

CHAT = {"messages": [{"role": "user", "content": "Tell me about cable cars."}], "max_tokens": 16, "ignore_eos": True}
DEFERRED = {**CHAT, "deferred": True}
SETTLE_SECONDS = 1.0
"""After a change, not measured: an outage has to be noticed."""


class Redis:
    def __init__(self, folder: str) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise SystemExit("redis-server is not installed.")
        self.socket = f"{folder}/redis.sock"
        self._command = [program, "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", folder]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        Path(self.socket).unlink(missing_ok=True)
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    async def there(self) -> None:
        """Whatever it was before, it works again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        else:
            self._process = self._start()

    async def frozen(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    async def gone(self) -> None:
        self.stop()

    async def flapping(self) -> None:
        while True:
            await self.frozen()
            await asyncio.sleep(1.0)
            await self.there()
            await asyncio.sleep(1.0)


async def load(client: httpx2.AsyncClient, rate: float, seconds: float, pick: random.Random) -> list[float]:
    """Seconds of each chat from when it was due, in an open loop."""
    begun, due, running, times = time.perf_counter(), 0.0, [], []

    async def chat(at: float) -> None:
        (await client.post("/v1/chat/completions", json=CHAT)).raise_for_status()
        times.append(time.perf_counter() - at)

    while (due := due + pick.expovariate(rate)) < seconds:
        await asyncio.sleep(begun + due - time.perf_counter())
        running.append(asyncio.create_task(chat(begun + due)))
    await asyncio.gather(*running)
    return times


async def trickle(client: httpx2.AsyncClient, rate: float, pick: random.Random) -> None:
    while True:
        await asyncio.sleep(pick.expovariate(rate))
        (await client.post("/v1/chat/completions", json=DEFERRED)).raise_for_status()


Pair = tuple[list[float], list[float]]
"""Times of chats in a stretch with Redis, and in the one after it without."""


async def measure(url: str, redis: Redis, options: argparse.Namespace) -> dict[str, list[Pair]]:
    """By kind of outage."""
    outages: dict[str, Callable[[], Awaitable[None]]] = {
        "frozen": redis.frozen, "gone": redis.gone, "flapping": redis.flapping,
    }  # fmt: skip
    found: dict[str, list[Pair]] = defaultdict(list)
    pick = random.Random(options.seed)
    async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:

        async def stretch(change: Callable[[], Awaitable[None]]) -> list[float]:
            changing = asyncio.ensure_future(change())
            await asyncio.sleep(SETTLE_SECONDS)
            times = await load(client, options.rate, options.seconds, pick)
            changing.cancel()
            with suppress(asyncio.CancelledError):
                await changing
            if trickling.done():
                trickling.result()  # says what has ended it
            return times

        await load(client, options.rate, 5.0, pick)
        trickling = asyncio.create_task(trickle(client, options.deferred_rate, pick))
        for _ in range(options.rounds):
            for name in options.outages.split(","):
                found[name].append((await stretch(redis.there), await stretch(outages[name])))
                await redis.there()
        trickling.cancel()
    return found


def percentiles(stretches: Iterable[list[float]]) -> tuple[float, float]:
    """p50 and p99 in milliseconds, of all chats in these stretches together."""
    middle, high = 1000 * np.percentile(np.concatenate(list(stretches)), [50, 99])
    return float(middle), float(high)


def difference(pairs: Sequence[Pair], seed: int) -> tuple[float, float, float]:
    """By how many milliseconds the p99 of an outage is beyond that of the stretch before: the median of `pairs`, and
    its 95 % interval, by drawing pairs."""
    pick = random.Random(seed)
    apart = [percentiles([without])[1] - percentiles([there])[1] for there, without in pairs]
    draws = [median(pick.choices(apart, k=len(apart))) for _ in range(2000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return median(apart), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--rate", type=float, default=20.0, help="chats a second")
    parser.add_argument("--deferred-rate", type=float, default=2.0, help="deferred requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each stretch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--outages", default="frozen,gone,flapping")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        redis = Redis(folder)
        try:
            flags = ["--redis-url", f"unix://{redis.socket}", "--data-dir", f"{folder}/data", "--log-level", "warning"]
            with serving(options.model, flags) as url:
                found = asyncio.run(measure(url, redis, options))
        finally:
            redis.stop()
    print(f"{'Redis':<10} {'chats':>7} {'p50 (ms) there':>15} {'away':>7} {'p99 there':>10} {'away':>7}   pair by pair")
    for name, pairs in found.items():
        there, away = percentiles(one for one, _ in pairs), percentiles(other for _, other in pairs)
        apart, low, high = difference(pairs, options.seed)
        chats = sum(len(one) + len(other) for one, other in pairs)
        print(
            f"{name:<10} {chats:>7} {there[0]:>15.1f} {away[0]:>7.1f} {there[1]:>10.1f} {away[1]:>7.1f}   "
            f"{apart:+.1f} ms ({low:+.1f} to {high:+.1f})"
        )


if __name__ == "__main__":
    main()
