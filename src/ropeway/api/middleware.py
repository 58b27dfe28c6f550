"""The gate in front of every route: nothing reaches a handler that has not passed it.

Because the gate stands before routing and lets only the listed public paths through without a key, a route cannot be
added that forgets to ask for one. It compares the very path that the router will match, never a rebuilt URL.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.accounts import Accounts, Meter
from ropeway.api import anthropic_errors, ui
from ropeway.api.errors import HttpError, error_response
from ropeway.api.feed import PATH as FEED
from ropeway.api.files import FORM_BYTES
from ropeway.api.files import PATH as FILES
from ropeway.api.files import too_large as file_too_large
from ropeway.api.inside import CALL, USED
from ropeway.api.limits import BODY_SECONDS, FILE_SECONDS
from ropeway.api.urgency import HEADER, from_header
from ropeway.config import ServerConfig
from ropeway.errors import EngineError, RopewayError
from ropeway.observe.metrics import Metrics

_log = logging.getLogger(__name__)

PUBLIC: Final = frozenset({"/livez", "/readyz", "/health", "/ping", "/version"}) | ui.PATHS
"""What anybody may ask, with GET or HEAD, on a server that has a key."""

ADMIN: Final = "/admin/"
"""Below this path the operator is at home, who has a key that no client has."""

SHARED: Final = ("/v1/requests", "/v1/usage", FEED)
"""Here and below, clients see what is theirs, and the operator sees all."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Keys:
    """The API keys, kept as digests. A key's tenant is a name made from its digest."""

    def __init__(self, keys: str | None) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in split_list(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, key: bytes) -> str | None:
        """The tenant of a presented key, or None. The time taken does not depend on the key."""
        digest, found = hashlib.sha256(key).digest(), None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known.hex()[:16]
        return found


class Gate:
    """ASGI middleware: request id, host, browser and key checks, body limits, timing headers, one log line."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, accounts: Accounts) -> None:
        self._app = app
        self._metrics = metrics
        self._accounts = accounts
        self._keys = Keys(config.api_key)
        self._admin = Keys(config.admin_key)
        self._tenant_header = (config.tenant_header or "").lower().encode()
        self._hosts = allowed_hosts(config)
        self._max_body = int(config.max_body_mib * 1024 * 1024)
        self._max_file = int(config.max_file_mib * 1024 * 1024)
        self._date = (0, b"")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = _Headers(scope["headers"])
        request_id = _request_id(headers)
        call = scope.get(CALL)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, tenant="", operator=False, urgency=None, account=None, meter=None)
        state["trace"] = headers.one(b"traceparent").decode("latin-1")
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = (time.perf_counter() - started) * 1000
                meter: Meter | None = scope["state"]["meter"]
                limits = meter.headers() if meter is not None else ()
                message["headers"] = [*message.get("headers", ()), *self._common(request_id, took), *limits]
            await send(message)

        try:
            if call is not None:
                counted = await self._accounts.meter_of_job(call.key, call.tenant, call.terms)
                account = counted.account if counted is not None else None
                state.update(tenant=call.tenant, urgency=call.urgency, account=account, meter=counted)
                try:
                    await self._app(scope, receive, tell)
                finally:
                    if counted is not None:
                        if not 0 < status < 500:
                            counted.forgive()
                        state[USED] = counted.used
                return
            self._check_sender(scope, headers)
            await self._identify(scope, headers)
            self._check_head(scope, headers)
            with self._counted(scope):
                await self._app(scope, self._bounded(scope, receive, headers), tell)
        except RopewayError as error:
            if status == 0:
                await refusal(scope, error)(scope, receive, tell)
            # It and the frames that it came through hold each other, and with them the body, until the collector comes.
            error.__traceback__ = None
        except Exception as error:
            _log.exception("request %s failed in %s", request_id, _route(scope))
            if status == 0:
                await refusal(scope, EngineError(type(error).__name__))(scope, receive, tell)
            else:
                raise
        finally:
            seconds = time.perf_counter() - started
            if call is None:
                self._metrics.http_request(scope["method"], _route(scope), status, seconds)
            where = (scope["method"], scope["path"], status or "-", seconds * 1000, request_id)
            _log.debug("%s %s %s %.1f ms %s", *where)

    def _check_sender(self, scope: Scope, headers: _Headers) -> None:
        """Raises HttpError for what a page on the web has sent."""
        self._check_host(headers.one(b"host"))
        if scope["method"] not in _SAFE_METHODS:
            self._check_browser(headers)

    async def _identify(self, scope: Scope, headers: _Headers) -> None:
        """Find out who asks, and what counts it. Raises HttpError for whoever may not come in."""
        state = scope["state"]
        await self._check_key(scope, headers)
        named = headers.one(self._tenant_header).decode("latin-1") if self._tenant_header else ""
        if named:
            if not _TENANT.fullmatch(named):
                raise HttpError(400, "The tenant's name is at most 128 letters, digits or . _ : @ - characters.")
            state["tenant"] = named
        state["meter"] = self._accounts.meter(state["account"], tenant=state["tenant"])

    async def _check_key(self, scope: Scope, headers: _Headers) -> None:
        state, path, presented = scope["state"], scope["path"], _presented_key(headers)
        admin = self._admin.tenant(presented)
        if path.startswith(ADMIN):
            await self._check_admin(admin, presented)
            state["tenant"] = admin
            return
        if admin is not None and _is_shared(path):
            state["operator"] = True
            return
        if path in PUBLIC and scope["method"] in ("GET", "HEAD"):
            return
        if not await self._accounts.required() and not self._keys:
            return
        tenant = self._keys.tenant(presented)
        if tenant is None:
            account = await self._accounts.find(presented)
            if account is None:
                raise _wrong_key(presented)
            state["account"], tenant = account, account.tenant
        state["tenant"] = tenant

    async def _check_admin(self, admin: str | None, presented: bytes) -> None:
        if not self._admin:
            message = "This server has no administrator. Start it with --admin-key to use the paths below /admin/."
            raise HttpError(403, message, code="admin_disabled")
        if admin is not None:
            return
        if self._keys.tenant(presented) is not None or await self._accounts.find(presented) is not None:
            message = "This key is a client's. Send the administrator's: the paths below /admin/ take no other."
            raise HttpError(403, message, code="insufficient_permissions")
        raise _wrong_key(presented)

    @contextmanager
    def _counted(self, scope: Scope) -> Generator[None, None, None]:
        """What is posted counts as a request, and as one under way, but for cancelling. Raises RateLimitError."""
        meter: Meter | None = scope["state"]["meter"]
        if meter is None or scope["method"] != "POST" or scope["path"].endswith("/cancel"):
            yield
            return
        try:
            meter.enter()
        except RopewayError as error:
            self._metrics.rejected(error.code)
            raise
        try:
            yield
        finally:
            meter.leave()

    def _check_head(self, scope: Scope, headers: _Headers) -> None:
        """Raises HttpError for a body that is not even read, or for a priority that there is not."""
        if headers.one(b"content-encoding").lower() not in (b"", b"identity"):
            raise HttpError(415, "Compressed bodies are not accepted. Send it without Content-Encoding.", close=True)
        scope["state"]["urgency"] = from_header(headers.one(HEADER.encode()))
        length, most = headers.one(b"content-length"), self._most(scope)
        if length.isdigit() and int(length) > most:
            raise self._too_large(scope)

    def _check_host(self, host: bytes) -> None:
        """A page on the web can make a browser call this server under a name that the page's owner controls (DNS
        rebinding). Addresses cannot be rebound; names have to be known."""
        name = _host_name(host.decode("latin-1"))
        if name in self._hosts or "*" in self._hosts or _is_address(name):
            return
        if any(known.startswith(".") and name.endswith(known) for known in self._hosts):
            return
        shown = name if len(name) <= 64 else name[:64] + "..."
        raise HttpError(
            403,
            f"This server does not answer to the host name '{shown}'. Start it with --allowed-hosts to add it.",
            code="host_not_allowed",
        )

    @staticmethod
    def _check_browser(headers: _Headers) -> None:
        """No page of another origin may make a visitor's browser spend this server's time."""
        site = headers.one(b"sec-fetch-site")
        origin = headers.one(b"origin")
        foreign = site not in (b"", b"same-origin", b"none")
        if not site and origin:
            foreign = urlsplit(origin.decode("latin-1")).netloc != headers.one(b"host").decode("latin-1")
        if foreign:
            message = "Requests from pages of another origin are refused. Call the server from your own back end."
            raise HttpError(403, message, code="cross_origin")

    def _bounded(self, scope: Scope, receive: Receive, headers: _Headers) -> Receive:
        """`receive` that counts a body while it arrives, and does not wait for it for ever."""
        if not headers.one(b"content-length") and not headers.one(b"transfer-encoding"):
            return receive
        seen, complete, most = 0, False, self._most(scope)
        allowed = FILE_SECONDS if _uploads(scope) else BODY_SECONDS
        deadline = time.monotonic() + allowed

        async def bounded() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(min(max(0.0, deadline - time.monotonic()), BODY_SECONDS)):
                    message = await receive()
            except TimeoutError:
                message_text = f"The body had not arrived completely after {allowed:g} s, or nothing came for long."
                raise HttpError(408, message_text, close=True) from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen > most:
                    raise self._too_large(scope)
            return message

        return bounded

    def _most(self, scope: Scope) -> int:
        """Bytes that a body may have; a file's own limit holds for the file alone."""
        return self._max_file + FORM_BYTES if _uploads(scope) else self._max_body

    def _too_large(self, scope: Scope) -> HttpError:
        if _uploads(scope):
            return file_too_large(self._max_file)
        mib = self._max_body / 1024 / 1024
        return HttpError(
            413,
            f"The body is larger than {mib:g} MiB. Send less, or start the server with a higher --max-body-mib.",
            code="request_too_large",
        )

    def _common(self, request_id: str, took_ms: float) -> Sequence[tuple[bytes, bytes]]:
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, formatdate(now, usegmt=True).encode()
        return (
            (b"date", self._date[1]),
            (b"x-request-id", request_id.encode()),
            (b"openai-processing-ms", b"%d" % took_ms),
            (b"openai-version", b"2020-10-01"),
            (b"x-content-type-options", b"nosniff"),
        )


class _Headers:
    """Header lookup that sees repeated headers: a request that sends one of these twice is not trusted."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._values: dict[bytes, bytes] = {}
        for name, value in raw:
            self._values[name] = value if name not in self._values else self._values[name] + b", " + value

    def one(self, name: bytes) -> bytes:
        return self._values.get(name, b"")


def refusal(scope: Scope, error: RopewayError) -> Response:
    """`error` in the dialect of the path that was asked for."""
    if anthropic_errors.speaks(scope["path"]):
        return anthropic_errors.message_error_response(error, scope["state"]["request_id"])
    return error_response(error)


def _wrong_key(presented: bytes) -> HttpError:
    said = "This API key is unknown, expired or revoked" if presented else "This server wants an API key"
    return HttpError(401, f"{said}. Send a valid one as 'Authorization: Bearer KEY'.", code="invalid_api_key")


def _is_shared(path: str) -> bool:
    return any(path == shared or path.startswith(shared + "/") for shared in SHARED)


def allowed_hosts(config: ServerConfig) -> frozenset[str]:
    """Host names that the server answers to, in lower case; '.example.org' stands for all names below it."""
    return frozenset({*_LOOPBACK_NAMES, config.host.lower(), *(h.lower() for h in split_list(config.allowed_hosts))})


def split_list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def is_loopback(host: str) -> bool:
    """Whether binding to `host` keeps the server on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _request_id(headers: _Headers) -> str:
    """The client's own id if it is harmless, a new one otherwise."""
    given = headers.one(b"x-request-id").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"


def _presented_key(headers: _Headers) -> bytes:
    scheme, _, key = headers.one(b"authorization").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return headers.one(b"x-api-key")


def _host_name(host: str) -> str:
    """The name in a Host header, without port, brackets and letter case; '' if it is not one."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?", host)
    return (match[1] or match[2]).lower().rstrip(".") if match else ""


def _uploads(scope: Scope) -> bool:
    return bool(scope["path"] == FILES and scope["method"] == "POST")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _route(scope: Scope) -> str:
    """The template of the matched route, from a closed set; never client text."""
    route = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "other"
