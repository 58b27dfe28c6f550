"""The feed without HTTP: one look for all who watch, the newest frame for who reads slowly, nothing for nobody."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from ropeway.api.feed import WATCHERS, Hub, _Stream
from ropeway.api.feed_schema import frame, nothing
from ropeway.api.registry import Registry
from ropeway.config import ServerConfig
from ropeway.contract import ExecutorInfo
from ropeway.contract.channel import LinkState
from ropeway.contract.scene import Happening, Scene, Seat, Waiting
from ropeway.errors import EngineError, OverloadedError
from waiting import eventually


class Service:
    """Something else is seen with each look."""

    def __init__(self) -> None:
        self.model_name = "m"
        self.state = LinkState.READY
        self.info: ExecutorInfo | None = None
        self.looks: list[int] = []
        self.error: Exception | None = None
        self.stands = False

    async def look(self, since: int = 0) -> Scene:
        self.looks.append(since)
        if self.error is not None:
            raise self.error
        step = 7 if self.stands else len(self.looks)
        news = [] if self.stands else [Happening(n, 1.0, n, "queued") for n in range(since + 1, step + 1)]
        return _scene(step, news)


def _scene(step: int, news: list[Happening]) -> Scene:
    seat = Seat(0, 1, 2, 9, 5, 9, 4, 3, True, 1)
    empty = nothing(1.5)
    return Scene(
        token=0, at=1.5, step=step, seats=[seat], waiting=[Waiting(2, 0, 0, "seats", "all are taken by t", 1.0)],
        waiting_total=1, cells=b"\x01\x00", stats=None, rates=empty.rates, happenings=news, took=0.0,
    )  # fmt: skip


def api_of(service: Service, **config: float) -> Any:
    settings = ServerConfig(**{"keep_alive_interval": 0.3, "stream_timeout": 0.3, **config})  # type: ignore[arg-type]
    cut = asyncio.get_running_loop().create_future()
    return SimpleNamespace(engines=[service], models=["m"], requests=Registry(service), config=settings, cut=cut)  # type: ignore[arg-type]


class Client:
    """Reads as fast as it is let."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = asyncio.Event()
        self.aborted = False

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def abort(self) -> None:
        self.aborted = True

    def _told(self, head: str) -> list[Any]:
        text = b"".join(message.get("body", b"") for message in self.sent).decode()
        return [json.loads(block.removeprefix(head)) for block in text.split("\n\n") if block.startswith(head)]

    @property
    def frames(self) -> list[Any]:
        return self._told("data: ")

    @property
    def engines(self) -> list[Any]:
        """Those of the last greeting."""
        found: list[Any] = self._told("event: hello\ndata: ")[-1]["engines"]
        return found

    async def watch(self, stream: _Stream) -> None:
        await stream({"type": "http", "state": {"abort": self.abort}}, self.receive, self.send)

    async def until(self, frames: int) -> None:
        await eventually(lambda: len(self.frames) >= frames)


async def test_many_watch_and_the_engine_is_looked_at_once_a_tick_and_then_no_more() -> None:
    service = Service()
    api = api_of(service)
    hub, clients = Hub(api), [Client() for _ in range(5)]
    tasks = [asyncio.create_task(client.watch(_Stream(api, hub, None, 0.1, None))) for client in clients]
    for client in clients:
        await client.until(3)
    assert len(service.looks) <= max(len(client.frames) for client in clients) + 1
    for client in clients:
        client.gone.set()
    await asyncio.gather(*tasks)
    for _ in range(2):
        await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_each_model_has_frames_of_its_own_and_one_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hanging(Service):
        async def look(self, since: int = 0) -> Scene:
            await asyncio.sleep(60)
            return await super().look(since)

    monkeypatch.setattr("ropeway.api.feed._PATIENCE", 0.05)
    services = [Service(), Hanging()]
    services[1].model_name = "slow"
    api = api_of(services[0])
    api.engines = services
    client = Client()
    task = asyncio.create_task(client.watch(_Stream(api, Hub(api), None, 0.1, None)))
    await client.until(6)
    client.gone.set()
    await task
    assert [one["model"] for one in client.engines] == ["m", "slow"]
    assert [one["model"] for one in client.frames[:6]] == ["m", "slow"] * 3
    assert [one["step"] for one in client.frames[:6]] == [1, 0, 2, 0, 3, 0]


async def test_a_model_that_is_loaded_while_somebody_watches_is_announced_with_its_own_numbers() -> None:
    first, second = Service(), Service()
    second.model_name = "later"
    second.info = ExecutorInfo(
        model="l", device="cuda", dtype="bfloat16", num_blocks=9, block_size=32, max_slots=5, max_model_len=99,
        vocab_size=9,
    )  # fmt: skip
    api = api_of(first)
    client = Client()
    task = asyncio.create_task(client.watch(_Stream(api, Hub(api), None, 0.1, None)))
    await client.until(1)
    assert [(one["model"], one["slots"]) for one in client.engines] == [("m", 0)]
    api.engines = [first, second]
    await client.until(4)
    assert [(one["model"], one["device"], one["slots"]) for one in client.engines] == [
        ("m", "", 0),
        ("later", "cuda", 5),
    ]
    api.engines = [second]
    await client.until(8)
    assert [one["model"] for one in client.engines] == ["later"]
    client.gone.set()
    await task


async def test_who_reads_slowly_gets_the_newest_and_who_reads_nothing_is_left() -> None:
    service = Service()
    api = api_of(service, stream_timeout=60.0)
    hub, slow = Hub(api), Client()
    task = asyncio.create_task(slow.watch(_Stream(api, hub, None, 0.1, None)))
    await slow.until(2)
    slow.reads.clear()
    seen = len(service.looks)
    await eventually(lambda: len(service.looks) >= seen + 4)
    slow.reads.set()
    before = len(slow.frames)
    await slow.until(before + 2)
    steps = [one["step"] for one in slow.frames]
    assert steps == sorted(steps)
    assert max(after - one for one, after in pairwise(steps)) >= 3  # the frames between are lost
    api.config = api_of(service, stream_timeout=0.3).config
    slow.reads.clear()
    async with asyncio.timeout(20):
        await task
    assert slow.aborted


async def test_so_many_frames_and_an_orderly_end() -> None:
    service = Service()
    api = api_of(service)
    client = Client()
    await client.watch(_Stream(api, Hub(api), None, 0.1, 2))
    assert [one["step"] for one in client.frames] == [1, 2]
    assert client.frames[0]["events"] == []  # what was before anybody watched is no news
    assert [event["id"] for event in client.frames[1]["events"]] == ["~2"]
    assert client.sent[1]["body"].startswith(b"event: hello\ndata: {")
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_server_that_ends_ends_the_feed() -> None:
    service = Service()
    api = api_of(service)
    client = Client()
    task = asyncio.create_task(client.watch(_Stream(api, Hub(api), None, 0.1, None)))
    await client.until(1)
    api.cut.set_result(EngineError("over"))
    async with asyncio.timeout(20):
        await task
    assert client.sent[-1]["more_body"] is False
    assert not client.aborted


async def test_nothing_new_is_told_seldom_and_an_engine_that_dies_is_told_at_once() -> None:
    service = Service()
    service.stands = True
    api = api_of(service)
    client = Client()
    task = asyncio.create_task(client.watch(_Stream(api, Hub(api), None, 0.1, None)))
    await client.until(1)
    await eventually(lambda: any(message.get("body") == b": keep-alive\n\n" for message in client.sent))
    assert len(client.frames) == 1
    service.state, service.error = LinkState.STARTING, EngineError("gone")
    await client.until(2)
    assert (client.frames[-1]["state"], client.frames[-1]["seats"]) == ("starting", [])
    service.state, service.error, service.stands = LinkState.READY, None, False
    await client.until(3)
    assert client.frames[-1]["state"] == "ready"
    client.gone.set()
    await task


async def test_a_fault_of_one_engine_is_told_in_the_log_and_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    services = [Service(), Service()]
    services[1].model_name, services[1].error = "odd", ZeroDivisionError("a fault")
    api = api_of(services[0])
    api.engines = services
    client = Client()
    task = asyncio.create_task(client.watch(_Stream(api, Hub(api), None, 0.1, None)))
    await client.until(4)
    client.gone.set()
    await task
    assert [(one["model"], one["step"]) for one in client.frames[:4]] == [("m", 1), ("odd", 0), ("m", 2), ("odd", 0)]
    assert "the engine of odd cannot be looked at" in caplog.text


async def test_there_is_a_bound_on_those_who_watch() -> None:
    service = Service()
    hub = Hub(api_of(service))
    watching = [hub.watching(1.0) for _ in range(WATCHERS)]
    for one in watching:
        one.__enter__()
    with pytest.raises(OverloadedError, match=str(WATCHERS)), hub.watching(1.0):
        pass
    for one in watching:
        one.__exit__(None, None, None)
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("tenant", "seat", "waiting", "reason"),
    [
        (None, "req-1", "req-2", "all are taken by t"),
        ("t", "req-1", "~2", ""),
        ("other", "~1", "req-2", "all are taken by t"),
        ("nobody", "~1", "~2", ""),
    ],
)
def test_who_may_see_whose_names(tenant: str | None, seat: str, waiting: str, reason: str) -> None:
    names = {1: ("req-1", "t"), 2: ("req-2", "other")}
    made = frame("m", "ready", _scene(3, [Happening(1, 1.0, 1, "failed", "secret")]), 2, names, tenant)
    assert (made.seats[0].id, made.seats[0].phase, made.seats[0].urgency) == (seat, "prefill", "low")
    assert (made.waiting[0].id, made.waiting[0].reason, made.waiting[0].holder) == (waiting, reason, "seats")
    assert made.events[0].reason == ("secret" if tenant in (None, "t") else "")
    assert (made.kv.cells, made.kv.total) == ("AQA=", 2)
