"""Spans for an OpenTelemetry collector, as JSON over HTTP: no package is needed for that.

Sources: OTLP 1.x ("OTLP/HTTP", "JSON Protobuf Encoding") and W3C Trace Context (the header traceparent).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx2
import msgspec

from ropeway._version import __version__
from ropeway.config.address import http_address
from ropeway.errors import ConfigError

_log = logging.getLogger(__name__)

INTERNAL: Final = 1
SERVER: Final = 2
"""Kinds of spans."""

TRACES: Final = "/v1/traces"
_TIMEOUT: Final = 10.0
_QUIET: Final = 60.0
"""Seconds between two warnings that spans are lost."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
Value = str | bool | int | float | Sequence[str]


@dataclass(frozen=True)
class Parent:
    """The span of somebody else that a request belongs to. One that is not `sampled` wants no spans."""

    trace_id: str
    span_id: str
    sampled: bool


def parent_of(traceparent: str) -> Parent | None:
    """What a header says; None if there is none, or it is not as the standard wants it: then a trace begins here."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Parent(trace, span, bool(int(flags, 16) & 1))


def new_trace() -> str:
    return secrets.token_hex(16)


def new_span() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Times are seconds since 1970. `events` are (when, name, attributes); `error` says what went wrong."""

    trace_id: str
    name: str
    begin: float
    end: float
    span_id: str = field(default_factory=new_span)
    parent_id: str = ""
    kind: int = INTERNAL
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: Sequence[tuple[float, str, Mapping[str, Value]]] = ()
    error: str | None = None


def encode(spans: Sequence[Span], resource: Mapping[str, Value]) -> bytes:
    """The body of a request to a collector."""
    scope = {"name": "ropeway", "version": __version__}
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource)},
                "scopeSpans": [{"scope": scope, "spans": [_span(span) for span in spans]}],
            }
        ]
    }
    return msgspec.json.encode(body)


def _span(span: Span) -> dict[str, Any]:
    made: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": _nanos(span.begin),
        "endTimeUnixNano": _nanos(max(span.end, span.begin)),
        "attributes": _attributes(span.attributes),
    }
    if span.parent_id:
        made["parentSpanId"] = span.parent_id
    if span.events:
        made["events"] = [
            {"timeUnixNano": _nanos(at), "name": name, "attributes": _attributes(attributes)}
            for at, name, attributes in span.events
        ]
    if span.error is not None:
        made["status"] = {"code": 2, "message": span.error}
    return made


def _nanos(seconds: float) -> str:
    """As text, for a JSON number is too short for it; and a float of seconds has no more than microseconds."""
    return str(round(seconds * 1e6) * 1000)


def _attributes(values: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in values.items()]


def _value(value: Value) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
    return {"arrayValue": {"values": [{"stringValue": one} for one in value]}}


class Sink(Protocol):
    """Where spans go."""

    async def send(self, spans: Sequence[Span]) -> None: ...

    async def close(self) -> None: ...


class Collector:
    """The collector at `endpoint`. What it does not take is lost: nothing waits for it."""

    def __init__(
        self, endpoint: str, headers: str | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`headers` are NAME=VALUE by commas. Raises ConfigError."""
        parts = http_address(endpoint)
        if parts is None:
            message = f"otlp_endpoint is {endpoint!r}; it must be an address such as http://127.0.0.1:4318."
            raise ConfigError(message, param="otlp_endpoint")
        self._url = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + TRACES
        self._resource = {"service.name": "ropeway", "service.version": __version__, "host.name": socket.gethostname()}
        self._resource["service.instance.id"] = f"{socket.gethostname()}:{os.getpid()}"
        loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._http = httpx2.AsyncClient(
            headers={"content-type": "application/json", **_headers(headers)}, timeout=_TIMEOUT, trust_env=not loopback
        )
        self._clock = clock
        self._warn_at = 0.0
        self.lost = 0

    async def send(self, spans: Sequence[Span]) -> None:
        """Raises nothing: a collector must not hurt what it is told of."""
        try:
            answer = await self._http.post(self._url, content=encode(spans, self._resource))
            problem = "" if answer.is_success else f"it answers {answer.status_code}"
        except httpx2.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.lost += len(spans)
            if self._clock() >= self._warn_at:
                self._warn_at = self._clock() + _QUIET
                _log.warning("%d spans are lost: the collector at %s: %s", self.lost, self._url, problem)

    async def close(self) -> None:
        await self._http.aclose()


def _headers(text: str | None) -> dict[str, str]:
    found = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = part.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9-]+", name.strip()) or not value.isprintable():
            message = "otlp_headers must be NAME=VALUE, several by commas."
            raise ConfigError(message, param="otlp_headers")
        found[name.strip()] = value.strip()
    return found
