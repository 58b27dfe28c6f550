"""Which deployment answers a request.

An ASGI application between the gate and the deployments, which are ASGI applications too. A request that names a model
is read once, and goes to a deployment of the route of that name. While nothing of an answer has come, another
deployment may be asked instead, within a budget. Every attempt is blamed on the one deployment that made it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.api import anthropic_errors
from ropeway.api.answer import CHECK_ONLY
from ropeway.api.errors import HttpError, classify, error_event
from ropeway.api.making import stop_all
from ropeway.api.sse import DONE
from ropeway.api.state import Api, disconnected, read_body, replayed
from ropeway.errors import DrainingError, NotReadyError, RequestError, RopewayError
from ropeway.gateway.asked import Asked, count
from ropeway.gateway.attempt import RETRIED, Attempt
from ropeway.gateway.choice import Going, Way
from ropeway.gateway.deployment import Deployment, LocalBackend
from ropeway.gateway.outcome import Splitter
from ropeway.gateway.proxy import UpstreamError
from ropeway.gateway.table import Route, Table
from ropeway.service.request import Meter

_log = logging.getLogger(__name__)

BY_BODY: Final = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/input_tokens", "/v1/messages",
        "/v1/messages/count_tokens", "/v1/embeddings", "/v1/score", "/v1/rerank", "/score", "/rerank", "/v2/rerank",
        "/tokenize", "/detokenize",
    }
)  # fmt: skip
"""What is posted here says in its body which model it is for."""

BY_QUERY: Final = frozenset({"/admin/scheduler", "/admin/queue", "/admin/pins"})
"""What is asked here is about the one local deployment that `?model=` names."""

PINS: Final = "/admin/pins/"
DEPLOYMENT: Final = b"x-ropeway-deployment"
"""Header that tells which deployment has answered."""


class Router:
    """Divides requests between `deployments` by `table`; everything that names no model goes to `front`.

    `api` is the server's. `splitter_of` gives who divides the traffic of a route, such as a canary, if anybody does.
    """

    def __init__(
        self,
        front: ASGIApp,
        table: Table,
        deployments: Mapping[str, Deployment],
        ways: Mapping[str, Way],
        api: Api,
        *,
        splitter_of: Callable[[str], Splitter | None] = lambda route: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._front = front
        self._table = table
        self._deployments = deployments
        self._ways = ways
        self._api = api
        self._splitter_of = splitter_of
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path in BY_BODY and scope["method"] == "POST":
            await self._answer(scope, receive, send)
        elif path in BY_QUERY or path.startswith(PINS):
            await self._administer(scope, receive, send)
        else:
            await self._front(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        scope["route"] = _Named(scope["path"])
        asked = Asked.of(await read_body(Request(scope, receive)), state["tenant"])
        route = self._table.route(asked.model)
        state["route"] = route.name
        if state.get("meter") is not None:
            state["meter"].model = route.name
        self._api.check_open()
        going = await self._going(route, asked, state["tenant"])
        if state.get(CHECK_ONLY):
            await self._check(going, scope, receive, send)
            return
        state["streams"] = asked.streams
        going.way.budget.request()
        deadline = self._clock() + self._api.config.request_timeout
        deployment = going.first()
        tried: tuple[str, ...] = ()
        while True:
            state["seconds_left"] = deadline - self._clock()
            attempt = Attempt(_with_header(send, deployment.name), self._clock)
            error = await self._attempt(going, deployment, attempt, scope, receive)
            tried = (*tried, deployment.name)
            following = going.after(tried) if _better_elsewhere(attempt, error) and self._clock() < deadline else None
            # Only a deployment that was asked makes the next one a second try.
            if following is None or (attempt.asked and not going.way.budget.take()):
                break
            going.way.retries += attempt.asked
            _log.info("request %s: %s cannot, trying %s", state["request_id"], deployment.name, following.name)
            deployment = following
        await _conclude(scope, attempt, error)

    async def _going(self, route: Route, asked: Asked, tenant: str) -> Going:
        tokens = await self._count(route, asked) if route.counts else 0
        targets, ruled = route.lead(tenant, tokens)
        splitter = None if ruled else self._splitter_of(route.name)
        return Going(self._ways[route.name], asked, targets, splitter, self._deployments)

    async def _attempt(
        self, going: Going, deployment: Deployment, attempt: Attempt, scope: Scope, receive: Receive
    ) -> RopewayError | None:
        """Let `deployment` answer, and write down what became of it. Returns what it raised.

        Raises what is wrong with the request or its account, which is nobody's failure.
        """
        life = deployment.begin()
        try:
            app = await _taken(deployment, receive)
        except BaseException as found:
            deployment.forget(life)
            if isinstance(found, RopewayError):
                return found
            raise
        if app is None:  # the client has left while the model was being loaded
            deployment.forget(life)
            return None
        local = isinstance(deployment.backend, LocalBackend)
        error: RopewayError | None = None
        try:
            with _charged(None if local else scope["state"].get("meter"), going.asked, attempt):
                attempt.begin()
                try:
                    again = replayed(going.asked.body(deployment.backend.model), receive)
                    # A scope of its own, for applications write into it which of them it is at.
                    await app({**scope}, again, attempt.send)
                except RopewayError as found:
                    error = found
                except Exception as found:
                    _log.exception("request %s failed at %s", scope["state"]["request_id"], deployment.name)
                    error = HttpError(500, f"{type(found).__name__} at the deployment {deployment.name}.")
        finally:
            deployment.backend.give_back()
            if attempt.asked and not attempt.about_account:
                # Also when this task is cancelled: then the outcome is that of an answer without an end.
                outcome = attempt.outcome(error, broken=isinstance(error, UpstreamError) and error.began)
                going.end(deployment, life, outcome, attempt.retry_after)
            else:
                deployment.forget(life)
        return error

    async def _count(self, route: Route, asked: Asked) -> int:
        """Tokens of the prompt: counted if the tokenizer of one of the route's models is at hand, else estimated."""
        backends = (self._deployments[name].backend for name in route.deployments)
        service = next((one.service for one in backends if one.service is not None), None)
        return asked.estimate if service is None else await count(asked, service)

    async def _check(self, going: Going, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is only to be checked by a model in memory. If there is none, take it as it is: what
        another server would say, or a model that has to be loaded, will be said when the request is sent there."""
        backends = (going.deployments[name].backend for name in going.names)
        backend = next((one for one in backends if one.service is not None and one.phase == "ready"), None)
        if backend is None:
            meter = scope["state"].get("meter")
            if meter is not None:  # whether the key may use the model at all
                meter.begin("")
                meter.end(0, 0, 0)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        app = await backend.take()
        try:
            await app({**scope}, replayed(going.asked.body(backend.model), receive), send)
        finally:
            backend.give_back()

    async def _administer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask a local model that is in memory. It is not loaded for that."""
        if scope["method"] == "PUT" and scope["path"].startswith(PINS):
            asked = Asked.of(await read_body(Request(scope, receive)), "")
            local = self._local(asked.model)
            receive = replayed(asked.body(local.backend.model), receive)
        else:
            named = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model")
            local = self._local(named[0] if named else None)
        if local.backend.phase != "ready":
            message = f"The model of {local.name} is {local.backend.phase}. Ask again when it has been loaded."
            raise NotReadyError(message, retry_after=5.0)
        app = await local.backend.take()
        inner = {**scope}
        try:
            await app(inner, receive, send)
        finally:
            local.backend.give_back()
            scope["route"] = inner.get("route")

    def _local(self, model: str | None) -> Deployment:
        """The local deployment of that name, or the only one. Raises RequestError."""
        local = {name: one for name, one in self._deployments.items() if isinstance(one.backend, LocalBackend)}
        if model is None and len(local) == 1:
            return next(iter(local.values()))
        if model not in local:
            names = ", ".join(local) or "none"
            raise RequestError(f"Name a local deployment as model. There are: {names}.", param="model")
        return local[model]


@dataclass(frozen=True)
class _Named:
    """Stands for a route in the metrics, for requests that no application of this server has matched."""

    path: str


async def _taken(deployment: Deployment, receive: Receive) -> ASGIApp | None:
    """The deployment's application, in use; None if the client left before it was ready."""
    if deployment.backend.phase == "ready":
        return await deployment.backend.take()
    taking = asyncio.create_task(deployment.backend.take())
    gone = asyncio.create_task(disconnected(receive))
    kept = False
    try:
        await asyncio.wait([taking, gone], return_when=asyncio.FIRST_COMPLETED)
        kept = taking.done()
        return taking.result() if kept else None
    finally:
        await stop_all([taking, gone])
        if not kept and not taking.cancelled() and taking.exception() is None:
            deployment.backend.give_back()  # it became ready in the very moment in which nobody wanted it any more


@contextmanager
def _charged(meter: Meter | None, asked: Asked, attempt: Attempt) -> Iterator[None]:
    """Charge an answer of another server to the request's account, by what that says that it has used."""
    if meter is None:
        yield
        return
    meter.begin("")
    try:
        meter.reserve(asked.estimate, asked.most)
        yield
    finally:
        read, cached, generated = attempt.usage
        if 200 <= attempt.status < 300:
            meter.end(
                asked.estimate if read is None else read, cached, attempt.texts if generated is None else generated
            )
        else:
            meter.end(0, 0, 0)


def _better_elsewhere(attempt: Attempt, error: RopewayError | None) -> bool:
    """Whether nothing of an answer has come, and another deployment may do better."""
    if (
        attempt.began
        or attempt.about_account
        or isinstance(error, DrainingError)
        or (isinstance(error, UpstreamError) and error.began)
    ):
        return False
    return (attempt.status if error is None else classify(error)[0]) in RETRIED


async def _conclude(scope: Scope, attempt: Attempt, error: RopewayError | None) -> None:
    """Let the client have what the last attempt came to."""
    if error is None:
        await attempt.release()
    elif not attempt.began:
        raise error
    elif attempt.streamed and not attempt.complete:
        await attempt.finish(last_words(scope, error, attempt.texts))
    elif (abort := scope["state"].get("abort")) is not None:
        abort()


def _with_header(send: Send, name: str) -> Send:
    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (DEPLOYMENT, name.encode())]
        await send(message)

    return named


def last_words(scope: Scope, error: RopewayError, events: int) -> bytes:
    """The end of a stream that broke off, in the dialect of its path."""
    path, request_id = scope["path"], scope["state"]["request_id"]
    if anthropic_errors.speaks(path):
        return b"event: error\ndata: " + anthropic_errors.envelope(error, request_id) + b"\n\n"
    if path == "/v1/responses":
        said = classify(error)[1]
        event = {
            "type": "error", "code": said.code, "message": said.message, "param": None, "sequence_number": events + 1,
        }  # fmt: skip
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return error_event(error) + DONE
