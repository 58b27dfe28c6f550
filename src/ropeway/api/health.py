"""Whether the server lives, is ready, and how busy it is."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ropeway._version import __version__
from ropeway.api.schema import Load, Readiness, Version
from ropeway.api.state import Api, api_of, jobs_of

_REASONS = {
    "starting": "The engine is loading the model.",
    "draining": "The server is shutting down.",
    "dead": "The engine has failed and will not be restarted.",
}


def readiness(api: Api, degraded: list[str]) -> Readiness:
    state = api.service.state.value
    if api.draining and state == "ready":
        state = "draining"
    reasons = [_REASONS[state]] if state in _REASONS else []
    return Readiness(not reasons, state, reasons, degraded)


async def livez(request: Request) -> Response:
    """200 as long as this process answers; says nothing about the engine."""
    return Response()


async def readyz(request: Request) -> Response:
    """200 when requests are taken, 503 with reasons when not."""
    answer = readiness(api_of(request), jobs_of(request).degraded)
    return json_response(answer, 200 if answer.ready else 503)


async def health(request: Request) -> Response:
    """200 while the engine works, also while it finishes its last requests; 503 before and after."""
    working = api_of(request).service.state in ("ready", "draining")
    return Response(status_code=200 if working else 503)


async def version(request: Request) -> Response:
    """The version of the server."""
    return json_response(Version(__version__))


async def load(request: Request) -> Response:
    """How busy the server is, in one look: for routers and autoscalers."""
    api = api_of(request)
    stats, blocks = api.service.stats, 0.0
    if stats is not None and stats.blocks_total:
        blocks = stats.blocks_used / stats.blocks_total
    running, waiting, seats = (stats.running, stats.waiting, stats.slots) if stats is not None else (0, 0, 0)
    return json_response(
        Load(server_load=api.active, running=running, waiting=waiting, seats=seats, kv_cache_usage=blocks)
    )


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    api = api_of(request)
    await jobs_of(request).look()
    body, content_type = api.metrics.render(api.service.stats)
    return Response(body, media_type=content_type)


def json_response(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
