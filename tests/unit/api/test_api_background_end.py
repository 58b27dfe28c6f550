"""The end of a response in the background: what memory says of it is what the tables say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from ropeway.api.background import Background
from ropeway.api.errors import HttpError
from ropeway.api.response_store import Entry, ResponseStore
from ropeway.errors import OverloadedError, RopewayError, StorageError
from ropeway.jobs.work import Call, Reply
from waiting import eventually


class Body(msgspec.Struct):
    status: str = "in_progress"


class Held:
    """A request that is held, unless somebody else was faster."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours

        self.ends: list[str] = []

    async def answered(self, reply: Reply) -> bool:
        self.ends.append(f"answered {reply.status}")
        return self.ours

    async def cancelled(self) -> None:
        self.ends.append("cancelled")

    async def refused(self) -> None:
        self.ends.append("refused")


class Events:
    """Writes what is to be told, and knows the response's state."""

    def __init__(self) -> None:
        self.body = Body()

    def snapshot(self) -> bytes:
        return msgspec.json.encode(self.body)

    def failure(self, error: RopewayError) -> bytes:
        self.body.status = "failed"
        return f"event: failed\ndata: {error.message}\n\n".encode()

    def cancelled(self) -> bytes:
        self.body.status = "cancelled"
        return b"event: cancelled\n\n"


class World:
    """A response in the background that `answer` makes."""

    def __init__(self, answer: Any, refusal: RopewayError | None = None) -> None:
        self.store = ResponseStore(count=9, size=1 << 20, ttl=60.0)
        self.entry = Entry("resp_1", "t", b"[]", background=True, streamed=True)
        self.events: Any = Events()
        self.held = Held(True)
        self.lost: Any = None
        api: Any = SimpleNamespace(cut=asyncio.get_running_loop().create_future())
        self._background = Background(api, self.store, self.entry, answer, self.events)
        self._refusal = refusal

    async def begin(self, call: Call, *, lost: Any, **_: object) -> Held:
        if self._refusal is not None:
            raise self._refusal
        self.lost = lost
        return self.held

    async def start(self) -> None:
        call = Call(url="/", body=b"{}")
        await self._background.start(self, call, note=b"", callback_url="")  # type: ignore[arg-type]

    @property
    def kept(self) -> bool:
        try:
            return self.store.get("t", "resp_1") is self.entry
        except HttpError:
            return False


async def says_and_waits(scope: Scope, receive: Receive, send: Send) -> None:
    """Says something, waits until nobody wants more, and goes on a little all the same."""
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"event: one\n\n", "more_body": True})
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.body", "body": b"event: two\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"event: end\n\n"})


async def test_what_cannot_be_written_down_does_not_begin() -> None:
    world = World(says_and_waits, StorageError("The disk is full."))
    with pytest.raises(StorageError):
        await world.start()
    assert (world.kept, world.entry.events) == (False, [])


@pytest.mark.parametrize(
    ("error", "message"),
    [(OverloadedError("It is full."), "It is full."), (KeyError("/root/secret"), "KeyError while answering")],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_what_an_answer_fails_with_is_told_and_kept_if_it_was_taken(
    begun: bool, error: Exception, message: str
) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200})
        raise error

    world = World(answer)
    if begun:
        await world.start()
        await eventually(lambda: world.entry.final)
        assert world.entry.events == [f"event: failed\ndata: {message}\n\n".encode()]
        assert world.held.ends == ["answered 500"]
    else:
        with pytest.raises(RopewayError, match=message):
            await world.start()
        assert world.held.ends == ["refused"], "nobody has to hear of it later"
    assert world.kept == begun


async def test_what_another_server_has_taken_over_is_left_to_it() -> None:
    world = World(says_and_waits)
    await world.start()
    await eventually(lambda: world.entry.events)
    world.lost()
    assert world.entry.final
    assert not world.kept, "the tables know how it stands"
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    first, last = world.entry.events
    assert (first, b"another one has taken over" in last) == (b"event: one\n\n", True)
    assert world.held.ends == [], "its end is not this server's to write down"


async def test_what_is_cancelled_says_nothing_more() -> None:
    world = World(says_and_waits)
    await world.start()
    await eventually(lambda: world.entry.events)
    assert world.entry.cancel is not None
    await world.entry.cancel()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    assert world.entry.events == [b"event: one\n\n", b"event: cancelled\n\n"]
    assert (world.kept, world.held.ends) == (True, ["cancelled"])


@pytest.mark.parametrize("ours", [True, False])
async def test_an_answer_that_came_too_late_is_not_shown(ours: bool) -> None:
    events: Any = SimpleNamespace(body=Body(), snapshot=lambda: b"{}")

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        events.body.status = "completed"
        await send({"type": "http.response.body", "body": b"event: end\n\n"})

    async def begin(call: Call, **_: object) -> Held:
        return Held(ours)

    store, jobs = ResponseStore(count=9, size=1 << 20, ttl=60.0), SimpleNamespace(begin=begin)
    entry = Entry("resp_1", "t", b"[]", background=True, streamed=True)
    api: Any = SimpleNamespace(cut=asyncio.get_running_loop().create_future())
    background = Background(api, store, entry, answer, events)  # type: ignore[arg-type]
    await background.start(jobs, Call(url="/", body=b"{}"), note=b"", callback_url="")  # type: ignore[arg-type]
    await eventually(lambda: entry.final)
    assert entry.events == [b"event: end\n\n"], "whoever follows hears the end"
    if ours:
        assert store.get("t", "resp_1") is entry
    else:
        with pytest.raises(HttpError):
            store.get("t", "resp_1")
