"""Models share memory: never more than there is, never at the cost of one in use, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ropeway.contract.channel import LinkState
from ropeway.errors import EngineError, ModelError, NotReadyError, RopewayError
from ropeway.gateway.deployment import LocalBackend
from ropeway.gateway.supervisor import REST, Place, Supervisor

GIB = {"a": 2.0, "b": 2.0, "c": 3.0}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001  # so that no two uses are at the same time
        return self.now


@dataclass
class Model:
    """A model in memory, of which `house` keeps the books."""

    house: House
    name: str
    app: Any = None
    service: Any = None
    idle: bool = True
    gone: asyncio.Future[RopewayError | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def stop(self) -> None:
        await asyncio.sleep(0)
        assert not self.house.users.get(self.name), f"{self.name} was stopped while it was in use"
        self.house.loaded.remove(self.name)
        self.house.stopped.append(self.name)


class House:
    """Models that take memory from the beginning of their start to the end of their stop."""

    def __init__(self, budget: float | None = 5.0, patience: float = 5.0, **gib: float) -> None:
        self.budget = budget
        self.loaded: list[str] = []
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.users: dict[str, int] = {}
        self.errors: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.clock = Clock()
        self.places = {
            name: Place(name, lambda name=name: self.start(name), size) for name, size in (gib or GIB).items()
        }
        self.supervisor = Supervisor(self.places.values(), budget=budget, patience=patience, clock=self.clock)

    async def start(self, name: str) -> Model:
        self.loaded.append(name)
        self.started.append(name)
        taken = sum(self.places[one].gib for one in self.loaded)
        assert self.budget is None or taken <= self.budget, f"{self.loaded} take {taken} GiB"
        try:
            await self.gate.wait()
            if name in self.errors:
                raise self.errors[name]
        except BaseException:
            self.loaded.remove(name)
            raise
        return Model(self, name)

    async def use(self, name: str, work: asyncio.Event | None = None) -> None:
        await self.supervisor.take(self.places[name])
        self.users[name] = self.users.get(name, 0) + 1
        try:
            if work is not None:
                await work.wait()
        finally:
            self.users[name] -= 1
            self.supervisor.give_back(self.places[name])


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_start_serves_all_who_wait() -> None:
    house = House()
    house.gate.clear()
    waiting = [asyncio.create_task(house.use("a")) for _ in range(5)]
    await settle()
    assert house.places["a"].phase == "starting"
    house.gate.set()
    await asyncio.gather(*waiting)
    await house.use("a")
    assert house.started == ["a"]


async def test_the_one_that_was_used_longest_ago_goes() -> None:
    house = House()
    await house.use("a")
    await house.use("b")
    await house.use("a")
    await house.use("c")  # 3 of 5 GiB: one of the others may stay
    assert house.stopped == ["b"]
    assert sorted(house.loaded) == ["a", "c"]


async def test_a_model_in_use_stays_and_the_other_waits_for_it() -> None:
    house, work = House(budget=3.0), asyncio.Event()
    using = asyncio.create_task(house.use("a", work))
    await settle()
    waiting = asyncio.create_task(house.use("c"))
    await settle()
    assert house.loaded == ["a"]
    assert not waiting.done()
    work.set()
    await asyncio.gather(using, waiting)
    assert house.stopped == ["a"]


async def test_a_model_with_work_that_nobody_waits_for_stays() -> None:
    house = House(budget=3.0, patience=0.05)
    await house.use("a")
    running = house.places["a"].running
    assert isinstance(running, Model)
    running.idle = False
    with pytest.raises(NotReadyError):
        await house.use("c")
    assert house.loaded == ["a"]


async def test_who_waits_too_long_is_told_what_takes_the_room() -> None:
    house, work = House(budget=3.0, patience=0.05), asyncio.Event()
    using = asyncio.create_task(house.use("a", work))
    await settle()
    with pytest.raises(NotReadyError, match=r"c needs 3 of 3 GiB.*a \(2 GiB, 1 requests\)") as refused:
        await house.use("c")
    assert refused.value.retry_after
    work.set()
    await using
    await house.use("c")  # who has given up does not stand in line any more


async def test_what_fits_beside_goes_past_those_that_wait_for_room() -> None:
    house, work = House(budget=5.0), asyncio.Event()
    using = asyncio.create_task(house.use("c", work))
    await settle()
    house.places["d"] = large = Place("d", lambda: house.start("d"), 4.0)
    house.supervisor._places.append(large)
    waiting = asyncio.create_task(house.use("d"))
    await settle()
    await house.use("a")
    assert not waiting.done()
    work.set()
    await asyncio.gather(using, waiting)
    assert sorted(house.stopped) == ["a", "c"]


async def test_a_failed_start_is_told_and_tried_again_later() -> None:
    house = House()
    house.errors["a"] = ModelError("There are no weights.")
    for _ in range(3):
        with pytest.raises(NotReadyError, match="There are no weights"):
            await house.use("a")
    assert house.started == ["a"]  # once: whoever asks meanwhile hears of it at once
    assert house.loaded == []
    del house.errors["a"]
    house.clock.now += REST
    await house.use("a")
    assert house.started == ["a", "a"]


async def test_a_fault_at_a_start_is_told_by_its_kind_alone(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.errors["a"] = KeyError("/root/secret")
    with pytest.raises(NotReadyError, match="KeyError at its start") as refused:
        await house.use("a")
    assert "secret" not in refused.value.message
    assert "/root/secret" in caplog.text, "whoever runs it wants to know"
    assert house.loaded == []


async def test_who_waits_too_long_for_a_start_is_told_so() -> None:
    house = House(patience=0.05)
    house.gate.clear()
    with pytest.raises(NotReadyError, match="The model of a is being loaded"):
        await house.use("a")
    assert house.started == ["a"]
    house.gate.set()
    await house.use("a")
    assert house.started == ["a"], "it was loaded all the same"


async def test_requests_for_an_engine_that_has_died_go_elsewhere_until_it_is_back() -> None:
    house = House()
    await house.use("a")
    backend, running = LocalBackend(house.places["a"], house.supervisor), house.places["a"].running
    assert isinstance(running, Model)
    running.service = SimpleNamespace(state=LinkState.READY)
    assert (backend.phase, backend.full) == ("ready", "")
    running.service.state = LinkState.STARTING
    assert (backend.phase, backend.full) == ("starting", "its engine has died and is being started again")


async def test_a_model_that_dies_is_started_again_when_it_is_wanted() -> None:
    house = House()
    await house.use("a")
    running = house.places["a"].running
    assert running is not None
    running.gone.set_result(EngineError("It has failed too often."))
    await settle()
    assert house.places["a"].phase == "failed"
    assert house.loaded == []
    with pytest.raises(NotReadyError, match="failed too often"):
        await house.use("a")
    house.clock.now += REST
    await house.use("a")


async def test_the_operator_stops_a_model_when_it_has_finished() -> None:
    house, work = House(), asyncio.Event()
    using = asyncio.create_task(house.use("a", work))
    await settle()
    house.supervisor.stop_when_idle(house.places["a"])
    await settle()
    assert house.loaded == ["a"]
    work.set()
    await using
    await settle()
    assert house.loaded == []
    assert house.places["a"].phase == "stopped"


async def test_close_ends_everything_also_what_is_being_loaded() -> None:
    house = House()
    await house.use("a")
    house.gate.clear()
    waiting = asyncio.create_task(house.use("b"))
    await settle()
    await house.supervisor.close()
    assert house.loaded == []
    with pytest.raises(NotReadyError):
        await waiting


@pytest.mark.parametrize("seed", range(20))
async def test_any_traffic_stays_within_the_budget_and_is_served(seed: int) -> None:
    """`House.start` and `Model.stop` look at every moment that something could go wrong in."""
    rng = random.Random(seed)
    sizes = {name: rng.choice([1.0, 2.0, 3.0]) for name in "abcde"}
    house = House(budget=rng.choice([3.0, 4.0, 6.0]), patience=30.0, **sizes)

    async def request() -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        await house.supervisor.take(house.places[name := rng.choice("abcde")])
        house.users[name] = house.users.get(name, 0) + 1
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        house.users[name] -= 1
        house.supervisor.give_back(house.places[name])

    async with asyncio.timeout(20):
        for _ in range(10):
            await asyncio.gather(*(request() for _ in range(rng.randrange(1, 12))))
    assert not any(place.users or place.waiting for place in house.places.values())
    await house.supervisor.close()
    assert house.loaded == []
