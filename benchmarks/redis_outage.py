"""What an outage of Redis does to chat on a server that shares background work over it.

    python benchmarks/redis_outage.py [MODEL] [--rate 20] [--seconds 20] [--rounds 3]

A server with a Redis of its own answers short chats that arrive at random at a fixed mean rate, while deferred requests
trickle in beside them. Redis is there for a while, then it is away for as long, and so on in turn: frozen (it takes
connections and says nothing), gone, or flapping between the two every second. Printed are the times of chats under each
condition, from the moment at which they were due, with a bootstrapped 95 % interval of the difference of their p99:
stretches are drawn, not chats, because whatever else disturbs the machine disturbs many chats in a row. Needs
redis-server. The machine should do nothing else.
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
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

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


async def measure(url: str, redis: Redis, options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Times of chats in each stretch, by condition."""
    outages: dict[str, Callable[[], Awaitable[None]]] = {
        "frozen": redis.frozen, "gone": redis.gone, "flapping": redis.flapping,
    }  # fmt: skip
    times: dict[str, list[list[float]]] = defaultdict(list)
    pick = random.Random(options.seed)
    async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
        await load(client, options.rate, 5.0, pick)
        trickling = asyncio.create_task(trickle(client, options.deferred_rate, pick))
        for _ in range(options.rounds):
            for name in options.outages.split(","):
                for condition, change in (("there", redis.there), (name, outages[name])):
                    changing = asyncio.ensure_future(change())
                    await asyncio.sleep(SETTLE_SECONDS)
                    times[condition].append(await load(client, options.rate, options.seconds, pick))
                    changing.cancel()
                await redis.there()
        trickling.cancel()
    return times


def p99(stretches: Sequence[list[float]]) -> float:
    """In milliseconds, of all chats in these stretches together."""
    return float(1000 * np.percentile(np.concatenate(stretches), 99))


def interval(of: list[list[float]], against: list[list[float]], seed: int) -> tuple[float, float]:
    """A 95 % interval of the difference of two p99, by drawing stretches."""
    pick = random.Random(seed)
    draws = [p99(pick.choices(of, k=len(of))) - p99(pick.choices(against, k=len(against))) for _ in range(2000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


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
                times = asyncio.run(measure(url, redis, options))
        finally:
            redis.stop()
    print(f"{'Redis':<10} {'chats':>7} {'p50 (ms)':>9} {'p99 (ms)':>9}   p99 against `there`")
    for condition, found in times.items():
        p50 = 1000 * np.percentile(np.concatenate(found), 50)
        line = f"{condition:<10} {sum(map(len, found)):>7} {p50:>9.1f} {p99(found):>9.1f}"
        if condition != "there":
            low, high = interval(found, times["there"], options.seed)
            line += f"   {p99(found) - p99(times['there']):+.1f} ms ({low:+.1f} to {high:+.1f})"
        print(line)


if __name__ == "__main__":
    main()
