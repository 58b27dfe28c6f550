"""Half an hour of everything at once, and what it leaves behind.

    python benchmarks/evidence/soak.py                            # 30 minutes, writes docs/evidence/soak.md
    python benchmarks/evidence/soak.py --minutes 2 --out /tmp/soak

A server of the bundled model with little KV memory, so that it preempts, is asked for chats, streams, structured
answers, calls of tools, deferred requests and batches, at random times at a share of the rate that it can carry.
Clients cancel, disconnect, and send what is wrong. The engine is killed twice. Then a crowd comes at once, more than at
any time after it, so that a later rise of memory is something that is kept, and not room for more at a time. Each
answer is held against what was asked. Memory, files, tasks and blocks are looked at all the time, and held at the end
against what they were.
Ends with 1 if an answer was wrong or something is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from chapter import COLORS, Chapter
from environment import ROOT, machine
from passengers import BACKGROUND, KINDS, Cut, Refused, Unexpected

from ropeway.bench.spawn import serving

FLAGS = ("--max-num-seqs", "24", "--num-kv-blocks", "400", "--kv-host-gib", "0.05", "--log-level", "warning")
SETTLE_SECONDS = 60.0
"""For what was asked to end, at most, and for pools to close what nobody uses."""
KILLS = (0.12, 0.25)
"""Shares of the time after which the engine is killed."""
CROWD = 0.3, 200
"""Share of the time after which a crowd comes, and how many they are."""
FROM = 0.6
"""Share of the time from which the slope is taken; in half an hour the last engine has then run for ten minutes."""


@dataclass
class Look:
    """One look at the server: seconds since the start, MiB that are its own, and how many of everything."""

    at: float
    server: float
    engine: float
    files: Counter[str]
    """Open ones by what they are: paths, sockets, pipes."""
    tasks: int
    threads: int
    blocks: float
    running: int


@dataclass
class Ride:
    """What has happened so far."""

    begun: float
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    down: float = 0.0
    """Until when the engine is known to be away: answers may say so."""

    def note(self, kind: str, how: str) -> None:
        self.ended[kind, how] += 1


class Server:
    """The processes behind an address."""

    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self.url, self.client = url, client
        self.process = psutil.Process().children()[0]

    @property
    def engine(self) -> psutil.Process:
        """The child that holds the model: the largest one."""
        return max(self.process.children(), key=lambda child: child.memory_info().rss)

    def files(self) -> Counter[str]:
        folder = Path(f"/proc/{self.process.pid}/fd")
        found: Counter[str] = Counter()
        for one in folder.iterdir():
            with contextlib.suppress(OSError):  # closed since
                found[re.sub(r":\[\d+\]$", "", str(one.readlink()))] += 1
        return found

    async def look(self, at: float) -> Look:
        text = (await self.client.get("/metrics")).text

        def value(name: str) -> float:
            return sum(float(found) for found in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))

        try:
            engine = self.engine.memory_full_info().uss / 2**20
        except (psutil.Error, ValueError):
            engine = float("nan")  # it was just killed
        return Look(
            at, self.process.memory_full_info().uss / 2**20, engine, self.files(),
            int(value("ropeway_server_tasks")), self.process.num_threads(), value("vllm:kv_cache_usage_perc"),
            int(value("vllm:num_requests_running") + value("vllm:num_requests_waiting")),
        )  # fmt: skip

    async def ready(self) -> None:
        while True:
            try:
                if (await self.client.get("/readyz")).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            await asyncio.sleep(0.1)


async def one(kind: str, client: httpx2.AsyncClient, ride: Ride, pick: random.Random) -> None:
    """One passenger, from asking to the end, and what became of it."""
    sent = time.monotonic()
    try:
        await KINDS[kind].ride(client, pick)
        ride.note(kind, "as asked")
    except Refused:
        ride.note(kind, "refused: busy")
    except Cut:
        ride.note(kind, "cut off, not checked")
    except Exception as problem:  # what is no JSON is wrong as well, and so is no answer at all
        if sent <= ride.down and isinstance(problem, Unexpected):
            ride.note(kind, "told that the engine failed")
        else:
            ride.note(kind, "wrong")
            ride.wrong.append(f"{kind} at {sent - ride.begun:.1f} s: {type(problem).__name__}: {problem}")


def kinds(pick: random.Random) -> str:
    return pick.choices(list(KINDS), [kind.share for kind in KINDS.values()])[0]


async def capacity(client: httpx2.AsyncClient, seconds: float, clients: int) -> float:
    """Requests a second of this mix when `clients` ask one after the other."""
    ride, until = Ride(time.monotonic()), time.monotonic() + seconds
    pick = random.Random(1)

    async def passenger() -> None:
        while time.monotonic() < until:
            await one(kinds(pick), client, ride, pick)

    await asyncio.gather(*(passenger() for _ in range(clients)))
    if ride.wrong:
        raise SystemExit("Before the soak began: " + "; ".join(ride.wrong[:5]))
    return sum(ride.ended.values()) / (time.monotonic() - ride.begun)


async def load(client: httpx2.AsyncClient, ride: Ride, rate: float, seconds: float, pick: random.Random) -> None:
    """Passengers at random times, in an open loop."""
    running: set[asyncio.Task[None]] = set()
    due = ride.begun
    while (due := due + pick.expovariate(rate)) < ride.begun + seconds:
        await asyncio.sleep(due - time.monotonic())
        task = asyncio.create_task(one(kinds(pick), client, ride, pick))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def background(client: httpx2.AsyncClient, ride: Ride, seconds: float, pick: random.Random) -> None:
    """A batch of requests after the other. It hears of no outage: its work is done when the engine is back."""
    while time.monotonic() < ride.begun + seconds:
        try:
            await BACKGROUND.ride(client, pick)
            ride.note("batch", "as asked")
        except Exception as problem:
            ride.note("batch", "wrong")
            ride.wrong.append(f"batch: {type(problem).__name__}: {problem}")
        await asyncio.sleep(min(20.0, seconds / 10))


async def crowd(client: httpx2.AsyncClient, ride: Ride, seconds: float, pick: random.Random) -> None:
    share, count = CROWD
    await asyncio.sleep(ride.begun + share * seconds - time.monotonic())
    await asyncio.gather(*(one(kinds(pick), client, ride, pick) for _ in range(count)))


async def murder(server: Server, ride: Ride, seconds: float) -> None:
    for share in KILLS:
        await asyncio.sleep(ride.begun + share * seconds - time.monotonic())
        ride.down = float("inf")
        ride.kills.append(time.monotonic() - ride.begun)
        server.engine.kill()
        await asyncio.sleep(0.5)
        await server.ready()
        ride.down = time.monotonic()


async def watch(server: Server, ride: Ride, every: float) -> None:
    while True:
        ride.looks.append(await server.look(time.monotonic() - ride.begun))
        await asyncio.sleep(every)


async def quiet(server: Server) -> Look:
    """A look at the server when nothing is under way any more."""
    until = time.monotonic() + SETTLE_SECONDS
    same, look = 0, await server.look(0.0)
    while time.monotonic() < until and (look.running or same < 8):
        await asyncio.sleep(1.0)
        before, look = look, await server.look(0.0)
        same = same + 1 if look.files == before.files else 0
    return look


async def soak(url: str, options: argparse.Namespace) -> tuple[Ride, float, Look, Look]:
    seconds = 60 * options.minutes

    def passengers() -> httpx2.AsyncClient:
        """Closed before each look that counts: a server keeps idle connections for longer than it is watched then."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3.0)
        return httpx2.AsyncClient(base_url=url, timeout=120.0, trust_env=False, limits=limits)

    async with httpx2.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as observer:
        server = Server(url, observer)
        async with passengers() as client:
            rate = options.rate or options.share * await capacity(client, min(30.0, seconds / 4), 16)
        before = await quiet(server)
        ride = Ride(time.monotonic())
        watching = asyncio.create_task(watch(server, ride, min(5.0, seconds / 100)))
        async with passengers() as client:
            await asyncio.gather(
                load(client, ride, rate, seconds, random.Random(options.seed)),
                background(client, ride, seconds, random.Random(options.seed + 1)),
                crowd(client, ride, seconds, random.Random(options.seed + 2)),
                murder(server, ride, seconds),
            )
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching  # else nobody hears that it has failed
        after = await quiet(server)
    return ride, rate, before, after


def slope(ride: Ride, seconds: float, part: str) -> tuple[float, float]:
    """MiB an hour by regression, and its standard error."""
    points = [(look.at, getattr(look, part)) for look in ride.looks if look.at >= FROM * seconds]
    at, size = (np.array(values) for values in zip(*points, strict=True))
    hours = (at - at.mean()) / 3600
    rise = float((hours * size).sum() / (hours**2).sum())
    left = size - size.mean() - rise * hours
    return rise, float(np.sqrt((left**2).sum() / (len(at) - 2) / (hours**2).sum()))


def left_over(before: Look, after: Look, folder: Path) -> list[str]:
    """What should not be there any more."""
    found = []
    if after.running:
        found.append(f"{after.running} requests still run or wait")
    if after.blocks:
        found.append(f"{after.blocks:.1%} of the KV blocks are held by nobody's requests")
    if after.tasks > before.tasks:
        found.append(f"{after.tasks - before.tasks} tasks more than before")
    found += [
        f"{count} times more often open than before: {name}" for name, count in (after.files - before.files).items()
    ]
    found += [f"the file {path.name}" for path in folder.rglob("*") if re.search(r"\.(tmp|part)", path.name)]
    return found


def page(ride: Ride, rate: float, before: Look, after: Look, options: argparse.Namespace, left: list[str]) -> str:
    seconds = 60 * options.minutes
    command = f"python benchmarks/evidence/soak.py --minutes {options.minutes:g}"
    command += f" --rate {options.rate:g}" if options.rate else f" --share {options.share:g}"
    command += f" --seed {options.seed}"
    chapter = Chapter("Soak", command, folder=options.out, stem="soak")
    share = "" if options.rate else f", {options.share:.0%} of what 16 clients in a closed loop were given"
    chapter.say(
        f"{options.minutes:g} minutes of everything at once on a server of the bundled model (`{' '.join(FLAGS)}`): "
        f"{sum(ride.ended.values()):,} requests and batches at {rate:.1f} a second{share}. The engine was killed after "
        + " and ".join(f"{at:.0f} s" for at in ride.kills)
        + f", and after {CROWD[0] * seconds:.0f} s {CROWD[1]} came at once. {machine()}. {time.strftime('%Y-%m-%d')}."
    )
    columns = ["as asked", "refused: busy", "cut off, not checked", "told that the engine failed", "wrong"]
    chapter.table(
        ("kind", *columns),
        [
            (
                f"{kind}: {KINDS[kind].says if kind in KINDS else BACKGROUND.says}",
                *(ride.ended[kind, c] for c in columns),
            )
            for kind in (*KINDS, "batch")
        ],
    )
    chapter.say(
        f"Memory of each process that is its own, by regression over the last {1 - FROM:.0%} of the time "
        "(the picture has all of it):"
    )
    rows = []
    for name, part in (("server (HTTP, text, jobs)", "server"), ("engine (model, KV, scheduler)", "engine")):
        rise, error = slope(ride, seconds, part)
        sizes = [getattr(look, part) for look in ride.looks if look.at >= FROM * seconds]
        rows.append((name, f"{sizes[0]:.1f} MiB", f"{sizes[-1]:.1f} MiB", f"{rise:+.2f} ± {error:.2f} MiB/h"))
    chapter.table(("process", "first", "last", "slope ± standard error"), rows)
    chapter.say(
        f"Before and after: {before.files.total()} and {after.files.total()} open files, {before.tasks} and "
        f"{after.tasks} tasks, {before.threads} and {after.threads} threads, {after.running} requests and "
        f"{after.blocks:.1%} of the KV blocks in use at the end. "
        + ("Left over: " + "; ".join(left) + "." if left else "Nothing is left over.")
    )

    def paint(axes: Any) -> None:
        at = [look.at / 60 for look in ride.looks]
        for color, part in zip(COLORS, ("server", "engine"), strict=False):
            axes.plot(at, [getattr(look, part) for look in ride.looks], color=color, label=part)
        for kill in ride.kills:
            axes.axvline(kill / 60, color="#999999", linestyle=":")
        axes.set(xlabel="minutes (dotted: the engine is killed)", ylabel="own memory, MiB", ylim=(0, None))
        axes.legend(frameon=False)

    chapter.draw("memory", "Memory of server and engine over the time of the soak", paint)
    if ride.wrong:
        chapter.say("Wrong answers:", "", *(f"- {line}" for line in ride.wrong[:20]))
    lines = ["# Soak", "", *chapter.lines, f"<!-- not run: takes half an hour -->\n```sh\n{chapter.command}\n```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.9, help="of the rate that a closed loop reaches")
    parser.add_argument("--rate", type=float, help="requests a second, instead of a share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence")
    parser.add_argument("--looks", type=Path, help="file for all that was seen, as JSON")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        flags = [*FLAGS, "--data-dir", f"{folder}/data", "--journal", f"{folder}/journal", "--journal-mb", "16"]
        with serving("bundled", flags) as url:
            ride, rate, before, after = asyncio.run(soak(url, options))
            left = left_over(before, after, Path(folder))
    (options.out / "soak.md").write_text(page(ride, rate, before, after, options, left))
    if options.looks:
        options.looks.write_text(json.dumps([vars(look) for look in ride.looks]) + "\n")
    print(f"{options.out / 'soak.md'}: {sum(ride.ended.values()):,} ended, {len(ride.wrong)} wrong; {left or 'clean'}")
    sys.exit(bool(ride.wrong or left))


if __name__ == "__main__":
    main()
