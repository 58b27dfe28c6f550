"""Asking the application from inside its own process: for work whose client is a table, or a file.

The call takes the path of a request that came by HTTP: gate, routes, checks, dialects. So its answer is the one that
HTTP would have given, to the byte. The gate takes the call's word for who asks, because no connection can put one into
a scope.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, Literal, get_args

import msgspec
from msgspec import Struct
from starlette.types import ASGIApp, Message, Scope

from ropeway.api.errors import ErrorEnvelope, HttpError, classify, seconds_of
from ropeway.errors import EngineError, RopewayError
from ropeway.jobs.work import NOT_JSON, Call, Reply

_log = logging.getLogger(__name__)

Endpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/score",
    "/v1/rerank",
]  # fmt: skip
URLS: Final[frozenset[str]] = frozenset(get_args(Endpoint))
"""What may be asked for from inside, and deferred: the endpoints that compute."""

CALL: Final = "ropeway.call"
"""Where a scope has the `Call` that it was made of."""

USED: Final = "used"
"""Where the state of its scope has in the end what the answer costs, if anybody counts that."""


class Asked(Struct, frozen=True):
    """What a body says about how it is to be answered, unchecked."""

    stream: Any = None
    deferred: Any = None
    background: Any = None
    callback_url: Any = None
    priority: Any = None
    service_tier: Any = None


def asked(body: bytes) -> Asked:
    """Says nothing of a body that is no JSON object: the endpoint complains of that."""
    try:
        return msgspec.json.decode(body, type=Asked)
    except NOT_JSON:
        return Asked()


class Inside:
    """A `Caller` that asks `app`. To cancel a call is to leave: the engine has its seat back within two steps."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, call: Call) -> Reply:
        refused = _refused(call)
        if refused is not None:
            return _reply_of(refused, call)
        answer, scope = _Collected(), _scope(call)
        try:
            await self._app(scope, _receive(call.body), answer.send)
        except RopewayError as error:
            return _reply_of(error, call)
        except Exception as error:
            _log.exception("request %s failed", call.request_id)
            return _reply_of(EngineError(type(error).__name__), call)
        if answer.status == 0:
            return _reply_of(EngineError("the call ended without an answer"), call)
        return Reply(
            status=answer.status,
            body=b"".join(answer.parts),
            request_id=answer.headers.get(b"x-request-id", b"").decode("latin-1") or call.request_id,
            retry_after=seconds_of(answer.headers),
            used=scope["state"].get(USED),
        )


class _Collected:
    """What an application sends, whole."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))


def _refused(call: Call) -> RopewayError | None:
    if call.url not in URLS:
        message = f"{call.url[:128]} cannot be called in a job. Call one of {', '.join(sorted(URLS))}."
        return HttpError(404, message, code="unknown_url")
    said = asked(call.body)
    if said.stream is True:
        return HttpError(400, "A job has nobody to read a stream; leave stream out.", param="stream")
    if said.background is True and call.url == "/v1/responses":
        return HttpError(400, "A job is in the background already; leave background out.", param="background")
    return None


def _scope(call: Call) -> Scope:
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(call.body)),
    ]
    if call.request_id:
        headers.append((b"x-request-id", call.request_id.encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": call.url,
        "raw_path": call.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
        CALL: call,
    }


def _receive(body: bytes) -> Any:
    """The body, and then silence: this client never leaves by itself."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody answers this future")

    return receive


def _reply_of(error: RopewayError, call: Call) -> Reply:
    status, body = classify(error)
    content = msgspec.json.encode(ErrorEnvelope(body))
    return Reply(status=status, body=content, request_id=call.request_id, retry_after=error.retry_after)
