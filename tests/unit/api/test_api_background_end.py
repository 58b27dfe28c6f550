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
from ropeway.jobs.work import Call, Reply
from waiting import eventually


class Body(msgspec.Struct):
    status: str = "in_progress"


class Held:
    """A request that is held, unless somebody else was faster."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours

    async def answered(self, reply: Reply) -> bool:
        return self.ours


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
