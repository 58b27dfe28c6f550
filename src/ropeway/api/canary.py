"""`/admin/canary`: try a deployment on a share of a route's traffic, and decide what becomes of it."""

from __future__ import annotations

import logging
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.canary_schema import CanaryChange, CanaryList, CanaryStart, CanaryState
from ropeway.api.errors import HttpError
from ropeway.api.health import json_response
from ropeway.api.parse import decode, ignored_header
from ropeway.api.state import read_body
from ropeway.errors import RequestError

_log = logging.getLogger(__name__)


class Canaries(Protocol):
    """What the endpoints need of whoever splits traffic. Changes last when the call returns. Raises RopewayError."""

    def states(self) -> list[CanaryState]: ...

    async def start(self, route: str, wanted: CanaryStart) -> CanaryState: ...

    async def set_weight(self, route: str, weight: float) -> CanaryState: ...

    async def end(self, route: str, *, promoted: bool) -> CanaryState: ...

    async def forget(self, route: str) -> None: ...


async def list_canaries(request: Request) -> Response:
    """How the canaries of all routes do."""
    return json_response(CanaryList(_canaries(request).states()))


async def start_canary(request: Request) -> Response:
    """Give a share of a route's traffic to another deployment, and watch it."""
    canaries = _canaries(request)
    body, ignored = decode(CanaryStart, await read_body(request), {})
    return _said(request, await canaries.start(_route(request), body), ignored)


async def change_canary(request: Request) -> Response:
    """Set its weight, promote it, or roll it back."""
    canaries = _canaries(request)
    body, ignored = decode(CanaryChange, await read_body(request), {})
    if (body.weight is None) == (body.state is None):
        raise RequestError("Give either weight or state.", param="weight" if body.weight is not None else "state")
    if body.weight is not None:
        state = await canaries.set_weight(_route(request), body.weight)
    else:
        state = await canaries.end(_route(request), promoted=body.state == "promoted")
    return _said(request, state, ignored)


async def forget_canary(request: Request) -> Response:
    """Forget a canary that has ended: its route leads again where the table of routes says."""
    canaries = _canaries(request)
    await canaries.forget(_route(request))
    _log.info("%s: canary of %s is forgotten", request.state.request_id, _route(request))
    return json_response(CanaryList(canaries.states()))


def _said(request: Request, state: CanaryState, ignored: list[str]) -> Response:
    told = (request.state.request_id, state.route, state.state, state.weight * 100, state.canary)
    _log.info("%s: canary of %s is %s, %.3g %% to %s", *told)
    response = json_response(state)
    response.headers.update(ignored_header(ignored))
    return response


def _canaries(request: Request) -> Canaries:
    found: Canaries | None = getattr(request.app.state, "canaries", None)
    if found is None:
        message = "This server has one model and no routes. Start it with --routes to divide traffic."
        raise HttpError(404, message, code="no_routes")
    return found


def _route(request: Request) -> str:
    return str(request.path_params["route"])
