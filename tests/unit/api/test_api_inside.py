"""What an application says to its own process, and that nothing escapes from it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from ropeway.api.inside import CALL, URLS, Inside
from ropeway.contract import Urgency
from ropeway.errors import EngineError, OverloadedError
from ropeway.jobs.work import Call

CHAT = Call(url="/v1/chat/completions", body=b'{"x": 1}', urgency=Urgency.LOW, tenant="t", request_id="req_1")


async def _respond(send: Send, status: int, body: bytes, **headers: str) -> None:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body[:1], "more_body": True})
    await send({"type": "http.response.body", "body": body[1:]})


async def test_a_call_is_a_request_and_its_answer_a_reply() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, await receive()))
        await _respond(send, 200, b'{"a": 1}', x_request_id="req_1", retry_after="7", retry_after_ms="1500")

    reply = await Inside(app)(CHAT)
    assert (reply.status, reply.body, reply.request_id, reply.retry_after) == (200, b'{"a": 1}', "req_1", 1.5)
    [(scope, message)] = seen
    assert (scope["path"], scope["method"], scope[CALL]) == (CHAT.url, "POST", CHAT)
    assert message == {"type": "http.request", "body": CHAT.body, "more_body": False}


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [(OverloadedError("full", retry_after=3.0), 503, 3.0), (EngineError("dead"), 500, None), (ValueError(), 500, None)],
)
async def test_errors_are_replies(error: Exception, status: int, retry_after: float | None) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    reply = await Inside(app)(CHAT)
    assert (reply.status, reply.retry_after, set(json.loads(reply.body))) == (status, retry_after, {"error"})


async def test_an_application_that_says_nothing_is_a_failure() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        return

    assert (await Inside(app)(CHAT)).status == 500


@pytest.mark.parametrize(
    ("url", "body", "status"),
    [
        ("/admin/scheduler", b"{}", 404),
        ("/v1/files", b"{}", 404),
        ("/v1/chat/completions/", b"{}", 404),
        ("/v1/completions", b'{"stream": true}', 400),
        ("/v1/responses", b'{"background": true}', 400),
    ],
)
async def test_what_no_job_may_ask_is_not_asked(url: str, body: bytes, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("asked all the same")

    assert (await Inside(app)(Call(url=url, body=body))).status == status
    assert url not in URLS or status == 400


async def test_cancelling_a_call_is_to_leave() -> None:
    waits, left = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waits.set()
        try:
            await receive()  # the client says nothing more, and never leaves by itself
        finally:
            left.set()

    call = asyncio.ensure_future(Inside(app)(CHAT))
    await asyncio.wait_for(waits.wait(), 10)
    assert not call.done()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert left.is_set()
