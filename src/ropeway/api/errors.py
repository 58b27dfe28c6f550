"""Every error as the object that OpenAI's clients understand: `{"error": {message, type, param, code}}`.

Sources: the OpenAI API reference (error codes) and the behaviour of openai-python, which picks its exception class by
status and retries 408, 409, 429 and 5xx unless `x-should-retry` says otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from ropeway.errors import (
    MAX_SHOWN,
    BudgetError,
    ConfigError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    NeverFitsError,
    NotReadyError,
    NumericalError,
    OverloadedError,
    RateLimitError,
    RequestError,
    RopewayError,
    StorageError,
    TemplateError,
    TokenLimitError,
    UnknownModelError,
)

MAX_RETRY_AFTER = 120.0
"""Seconds. openai-python ignores a longer Retry-After and falls back to its own short delay."""

_log = logging.getLogger(__name__)

_NOT_KEPT = (
    "The server cannot write down what must last, so it has not accepted this; its log says what is wrong with "
    "the disk. Send it again later."
)
_SERVER_FAILED = (
    "The server failed while it answered this request. Nothing is wrong with the request: send it again. "
    "If that happens again, look for the request id in the server's log."
)


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong. `param` names the field at fault, `code` is stable."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    error: ErrorBody


class HttpError(RequestError):
    """A refusal that only exists on HTTP: a wrong key, a body that is too large, a path that is not there."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.http_code = code
        self.close = close


def shown(name: str, otherwise: str = "of that id") -> str:
    """A name that a client sent, if it can be said again in an error."""
    return name if len(name) <= MAX_SHOWN and name.isprintable() else otherwise


def seconds_of(headers: Mapping[bytes, bytes]) -> float | None:
    """When to come again, by an answer's headers; None if they do not say so in seconds."""
    for name, unit in ((b"retry-after-ms", 1000.0), (b"retry-after", 1.0)):
        value = headers.get(name, b"")
        if value.isdigit() and len(value) < 10:
            return int(value) / unit
    return None


class StreamCancelled(RopewayError):
    """A request was ended on demand, and nobody shall send it again for that."""

    code = "RW-CANCEL"


# (class, status, type, code); the first match wins, so subclasses stand before their parents.
_TABLE: tuple[tuple[type[RopewayError], int, str, str | None], ...] = (
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (NeverFitsError, 400, "invalid_request_error", "kv_cache_too_small"),
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (TemplateError, 400, "invalid_request_error", "invalid_messages"),
    (RequestError, 400, "invalid_request_error", None),
    (ConfigError, 400, "invalid_request_error", None),
    (TokenLimitError, 429, "tokens", "rate_limit_exceeded"),
    (RateLimitError, 429, "requests", "rate_limit_exceeded"),
    (BudgetError, 429, "insufficient_quota", "insufficient_quota"),
    (NotReadyError, 503, "server_error", "model_loading"),
    (DrainingError, 503, "server_error", "server_draining"),
    (OverloadedError, 503, "overloaded_error", "server_overloaded"),
    (StorageError, 507, "server_error", "storage_failed"),
    (DeadlineError, 504, "timeout", "request_timeout"),
    (NumericalError, 500, "server_error", "numerical_error"),
    (StreamCancelled, 499, "cancelled", "request_cancelled"),
)


def classify(error: RopewayError) -> tuple[int, ErrorBody]:
    """The HTTP status and the error object for `error`. What engine and disk say of their failures stays in the log."""
    if isinstance(error, HttpError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, ErrorBody(error.message, kind, error.param, error.http_code)
    for cls, status, kind, code in _TABLE:
        if isinstance(error, cls):
            message = _NOT_KEPT if cls is StorageError else error.message
            return status, ErrorBody(message, kind, error.param, code)
    return 500, ErrorBody(_SERVER_FAILED, "server_error")


def headers_of(error: RopewayError, status: int) -> dict[str, str]:
    """Headers that tell a client what to do next."""
    headers = {"x-ropeway-error": error.code}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 503 or (status == 429 and error.retry_after is not None):
        wait = min(max(error.retry_after or 1.0, 0.001), MAX_RETRY_AFTER)
        headers["retry-after"] = str(math.ceil(wait))
        headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    elif status in (429, 504):
        headers["x-should-retry"] = "false"
    if isinstance(error, DrainingError) or (isinstance(error, HttpError) and error.close):
        headers["connection"] = "close"
    return headers


def error_response(error: RopewayError) -> Response:
    status, body = classify(error)
    if isinstance(error, StorageError):
        _log.error("refused with %d: %s", status, error.message)
    content = msgspec.json.encode(ErrorEnvelope(body))
    return Response(content, status, headers_of(error, status), "application/json")


def error_event(error: RopewayError) -> bytes:
    """The same object as an event of a stream whose head has already gone."""
    return b"data: " + msgspec.json.encode(ErrorEnvelope(classify(error)[1])) + b"\n\n"
