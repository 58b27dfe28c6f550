"""A canary is stopped when it is worse and left alone when it is not; what it is lasts."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import os
import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ropeway.api.canary_schema import CanaryStart
from ropeway.api.errors import HttpError
from ropeway.errors import RequestError, StorageError
from ropeway.experiment import Guard
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.canary import Canary, Record
from ropeway.gateway.outcome import Outcome

RUNS = int(os.environ.get("ROPEWAY_CANARY_RUNS", "20"))
"""Simulations where nothing is planted. Where something is there are an eighth of them. docs/canary.md has the figures
of 200."""
ANSWERS = 6000 if RUNS > 20 else 3000
SEEDS = range(max(3, RUNS // 8))


class World:
    """Users with habits who ask two deployments. Times are heavy-tailed: users differ, answers of one user differ, one
    in fifty stalls, and by day everything is slower."""

    def __init__(self, seed: int, *, weight: float = 0.1, users: int = 20_000, guard: Guard | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.habits = [self.random.lognormvariate(0, 0.3) for _ in range(users)]
        self.asking = list(itertools.accumulate(self.random.lognormvariate(0, 1) for _ in range(users)))
        record = Record(route="r", control="old", canary="new", weight=weight, salt=str(seed), guard=guard or Guard())
        self.canary = Canary(record, clock=lambda: self.now, wall=lambda: 1e9 + self.now)

    def ask(self, *, slower: float = 1.0, failing: float = 0.0, base_failing: float = 0.0) -> str:
        """One answer; the canary takes `slower` times as long."""
        self.now += 1.0
        user = bisect.bisect(self.asking, self.random.random() * self.asking[-1])
        where = self.canary.choose(f"user-{user}")
        worse = where == "new"
        seconds = self.habits[min(user, len(self.habits) - 1)] * self.random.lognormvariate(0, 0.7)
        seconds *= 1.5 if self.now % 2000 < 800 else 1.0
        seconds *= self.random.paretovariate(1.2) * 5 if self.random.random() < 0.02 else 1.0
        seconds *= slower if worse else 1.0
        failed = self.random.random() < (failing if worse else base_failing)
        outcome = Outcome(
            status=500 if failed else 200,
            latency_s=seconds,
            ttft_s=seconds / 10 * self.random.lognormvariate(0, 0.3),
            itl_s=seconds / 100 * self.random.lognormvariate(0, 0.1),
            streamed=True,
        )
        self.now += seconds  # so that nothing was sent before the trial began
        self.canary.observe(where, outcome, f"user-{user}")
        self.now -= seconds
        return where

    def until_stopped(self, most: int, **how: float) -> int:
        """The answers that it took; `most` if it was not stopped."""
        for number in range(1, most + 1):
            self.ask(**how)
            if self.canary.record.state != "running":
                return number
        return most


def spread(numbers: list[int]) -> str:
    return " - ".join(f"{sorted(numbers)[at]:,}" for at in (0, len(numbers) // 2, -1))


@pytest.mark.timeout(10 * RUNS)
def test_arms_that_are_equal_are_never_taken_for_unequal() -> None:
    stopped = []
    for seed in range(RUNS):
        world = World(seed, weight=(0.05, 0.1, 0.5)[seed % 3])
        world.until_stopped(ANSWERS, failing=0.01, base_failing=0.01)
        if world.canary.record.state != "running":
            stopped.append((seed, world.canary.record.reason))
    print(f"{len(stopped)} of {RUNS} equal canaries stopped")
    assert len(stopped) <= RUNS // 100, stopped


@pytest.mark.parametrize("weight", [0.1, 0.5])
@pytest.mark.parametrize("slower", [1.2, 1.5])
def test_a_canary_that_is_slower_is_stopped(slower: float, weight: float) -> None:
    took = []
    for seed in SEEDS:
        world = World(seed, weight=weight)
        took.append(world.until_stopped(60_000, slower=slower))
        assert world.canary.record.state == "stopped"
        assert world.canary.record.reason is not None
        assert world.canary.record.reason.split(":")[0] in ("latency", "ttft", "itl")
    print(f"{slower - 1:.0%} slower at {weight:.0%}: {len(took)} runs, stopped after {spread(took)} answers")


@pytest.mark.parametrize("failing", [0.05, 1.0])
def test_a_canary_that_fails_more_is_stopped(failing: float) -> None:
    took, own = [], []
    for seed in SEEDS:
        world = World(seed)
        took.append(world.until_stopped(20_000, failing=failing, base_failing=0.01))
        own.append(world.canary.record.sums.canary.failures.count)
        assert world.canary.record.state == "stopped"
        assert (world.canary.record.reason or "").startswith("errors")
    print(f"{failing:.0%} fail instead of 1 %: {len(took)} runs, stopped after {spread(took)} answers, of which")
    print(f"the canary's {spread(own)}")


def test_a_canary_that_is_better_goes_on() -> None:
    world = World(2, weight=0.5)
    world.until_stopped(ANSWERS, slower=0.5, base_failing=0.05)
    assert world.canary.record.state == "running"


def test_a_stop_moves_all_traffic_at_once() -> None:
    world = World(3, weight=0.5)
    before = {world.canary.choose(str(number)) for number in range(1000)}
    world.until_stopped(60_000, slower=3.0)
    assert before == {"old", "new"}
    assert {world.canary.choose(str(number)) for number in range(1000)} == {"old"}
    counted = world.canary.record.sums.canary.failures.count
    world.canary.observe("new", Outcome(status=200, latency_s=0.1), "late")
    assert world.canary.record.sums.canary.failures.count == counted


def test_only_what_chance_has_chosen_is_counted() -> None:
    world = World(4, weight=0.5)
    canary = world.canary
    own = canary.choose("somebody")
    other = "old" if own == "new" else "new"
    world.now = 10.0

    def counted() -> int:
        sums = canary.record.sums
        return sums.control.failures.count + sums.canary.failures.count

    fine = Outcome(status=200, latency_s=1.0)
    canary.observe(other, fine, "somebody")  # tried there after its own had failed
    canary.observe("third", fine, "somebody")
    canary.observe(own, Outcome(status=499, latency_s=1.0), "somebody")
    canary.observe(own, Outcome(status=200, latency_s=11.0), "somebody")  # sent before the canary began
    assert counted() == 0
    canary.observe(own, fine, "somebody")
    canary.observe(own, Outcome(status=200, latency_s=1.0, broken=True), "somebody")
    assert counted() == 2
    canary.set_weight(0.5)
    canary.observe(own, fine, "somebody")  # sent with the weight before
    assert counted() == 0
    assert canary.record.trial == 2


def test_times_of_answers_in_one_piece_have_no_first_token() -> None:
    world = World(5, weight=1.0)
    world.now = 10.0
    world.canary.observe("new", Outcome(status=200, latency_s=1.0, ttft_s=1.0), "k")
    world.canary.observe("new", Outcome(status=200, latency_s=1.0, ttft_s=0.1, itl_s=0.01, streamed=True), "k")
    times = world.canary.record.sums.canary.times
    assert [times[name].logs.count for name in ("latency", "ttft", "itl")] == [2, 1, 1]


@asynccontextmanager
async def kept(folder: Path, **changed: Any) -> Any:
    """Canaries of a server with the routes `chat` and `both`. Leaving is as if the process had been killed."""
    settings: dict[str, Any] = {
        "routes": {"chat": ["old"], "both": ["old", "new"]}, "deployments": {"old", "new", "newer"}, **changed,
    }  # fmt: skip
    canaries = Canaries(folder / "data" / "canary.db", **settings)
    try:
        yield canaries
    finally:
        if canaries._saving:
            await asyncio.wait(canaries._saving)
        if canaries._database is not None:
            canaries._database.close()


async def test_what_the_operator_says_survives_a_killed_server(tmp_path: Path) -> None:
    async with kept(tmp_path) as first:
        assert first.splitter("chat") is None
        assert not (tmp_path / "data").exists(), "a server without canaries writes nothing"
        state = await first.start("chat", CanaryStart(canary="new", weight=0.25))
        assert (state.control, state.state, state.weight) == ("old", "running", 0.25)
        users = {str(number): first.splitter("chat").choose(str(number)) for number in range(200)}
        assert set(users.values()) == {"old", "new"}
    async with kept(tmp_path) as second:
        assert {user: second.splitter("chat").choose(user) for user in users} == users
        await second.set_weight("chat", 0.75)
    async with kept(tmp_path) as third:
        [state] = third.states()
        assert (state.weight, state.trial) == (0.75, 2)
        moved = {user for user in users if third.splitter("chat").choose(user) != users[user]}
        assert moved
        assert all(users[user] == "old" for user in moved)
        await third.end("chat", promoted=True)
    async with kept(tmp_path) as fourth:
        assert {fourth.splitter("chat").choose(user) for user in users} == {"new"}
        state = await fourth.start("chat", CanaryStart(canary="newer"))
        assert state.control == "new", "a new canary is compared with what was promoted"
        await fourth.end("chat", promoted=False)
        assert {fourth.splitter("chat").choose(user) for user in users} == {"new"}
        await fourth.forget("chat")
    async with kept(tmp_path) as fifth:
        assert fifth.states() == []
        assert fifth.splitter("chat") is None


async def test_a_stop_and_the_sums_survive_a_killed_server(tmp_path: Path) -> None:
    now = 0.0
    async with kept(tmp_path, clock=lambda: now) as first:
        await first.start("chat", CanaryStart(canary="new", weight=0.5))
        splitter = first.splitter("chat")
        for number in range(50):
            now += 1.0
            splitter.observe(splitter.choose(str(number)), Outcome(status=200, latency_s=0.5), str(number))
            await asyncio.sleep(0)
    async with kept(tmp_path, clock=lambda: now) as second:
        [state] = second.states()
        counted = state.analysis.errors.control_samples + state.analysis.errors.canary_samples
        assert 44 <= counted <= 50, "sums are at most five seconds old"
        splitter = second.splitter("chat")
        number = 1000
        while splitter.record.state == "running":
            number, now = number + 1, now + 0.001
            where = splitter.choose(str(number))
            splitter.observe(where, Outcome(status=500 if where == "new" else 200, latency_s=0.0), str(number))
            assert number < 1200
    async with kept(tmp_path) as third:
        [state] = third.states()
        assert state.state == "stopped"
        assert (state.reason or "").startswith("errors")
        assert [event.what.split(":")[0] for event in state.events] == ["started, weight 50.000%", "stopped"]
        assert third.splitter("chat").choose("anybody") == "old"


@pytest.mark.parametrize(
    ("route", "wanted", "status", "param"),
    [
        ("nothing", {"canary": "new"}, 404, "route"),
        ("chat", {"canary": "newest"}, 400, "canary"),
        ("chat", {"canary": "new", "control": "gone"}, 400, "control"),
        ("chat", {"canary": "old"}, 400, "canary"),
        ("both", {"canary": "newer"}, 400, "control"),
    ],
)
async def test_what_cannot_be_started_is_refused(
    tmp_path: Path, route: str, wanted: dict[str, Any], status: int, param: str
) -> None:
    async with kept(tmp_path) as canaries:
        with pytest.raises(RequestError) as refused:
            await canaries.start(route, CanaryStart(**wanted))
        assert refused.value.param == param
        assert getattr(refused.value, "status", 400) == status
        assert canaries.states() == []


async def test_a_running_canary_has_to_end_first(tmp_path: Path) -> None:
    async with kept(tmp_path) as canaries:
        await canaries.start("both", CanaryStart(canary="newer", control="old"))
        for refused in (canaries.start("both", CanaryStart(canary="new", control="old")), canaries.forget("both")):
            with pytest.raises(HttpError) as error:
                await refused
            assert error.value.status == 409
        await canaries.end("both", promoted=False)
        with pytest.raises(HttpError) as error:
            await canaries.set_weight("both", 0.5)
        assert error.value.status == 409
        with pytest.raises(HttpError) as error:
            await canaries.end("chat", promoted=True)
        assert error.value.status == 404


async def test_a_table_without_its_deployments_leaves_a_canary_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with kept(tmp_path) as canaries:
        await canaries.start("chat", CanaryStart(canary="new"))
    async with kept(tmp_path, deployments={"old"}) as canaries:
        assert canaries.splitter("chat") is None
        assert "no deployment new" in caplog.text
    async with kept(tmp_path) as canaries:
        assert canaries.splitter("chat") is not None, "what was left out has not been forgotten"


async def test_what_cannot_be_kept_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    async with kept(tmp_path) as canaries:
        with pytest.raises(StorageError):
            await canaries.start("chat", CanaryStart(canary="new"))
        assert canaries.splitter("chat") is None


async def test_what_cannot_be_kept_leaves_the_last_decision_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(route: str, record: bytes | None) -> None:
        raise StorageError("the disk is full")

    async with kept(tmp_path) as canaries:
        await canaries.start("chat", CanaryStart(canary="new"))
        await canaries.end("chat", promoted=True)
        [before] = canaries.states()
        with monkeypatch.context() as patched:
            patched.setattr(canaries, "_write", full)
            with pytest.raises(StorageError):
                await canaries.start("chat", CanaryStart(canary="newer"))
        assert canaries.states() == [before]
        assert canaries.splitter("chat").choose("anybody") == "new"


async def test_a_damaged_record_is_said_and_not_guessed(tmp_path: Path) -> None:
    async with kept(tmp_path) as canaries:
        await canaries.start("chat", CanaryStart(canary="new"))
        await canaries._write("chat", b'{"route": "chat"}')
    with pytest.raises(StorageError, match="Move the file away"):
        async with kept(tmp_path):
            pass


async def test_a_rollback_holds_even_where_it_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with kept(tmp_path) as canaries:
        await canaries.start("chat", CanaryStart(canary="new", weight=1.0))

        async def full(route: str, record: bytes | None) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(canaries, "_write", full)
        with pytest.raises(StorageError):
            await canaries.end("chat", promoted=False)
        assert canaries.splitter("chat").choose("anybody") == "old"
        splitter = canaries.splitter("chat")
        assert splitter.record.state == "rolled_back"
        await canaries.close()  # says so in the log, and ends
