"""/v1/requests: which requests there are, why they wait, what they have cost, and their end on demand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final, get_args

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from ropeway.api import lists
from ropeway.api.errors import HttpError, shown
from ropeway.api.health import json_response
from ropeway.api.registry import RequestList, RequestState, State, Tracked
from ropeway.api.state import api_of
from ropeway.contract import Why
from ropeway.contract.scene import Life
from ropeway.errors import RequestError, RopewayError
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)
MAX_LISTED: Final = 1000
_STATES = get_args(State)
_PATIENCE = 2.0
"""Seconds to wait for the engine to say why, and for a cancelled answer to come to its end."""

LIST_PARAMETERS: Final = [
    {"name": "state", "in": "query", "schema": {"enum": list(_STATES)}},
    {"name": "timeline", "in": "query", "schema": {"type": "boolean", "default": False}},
    lists.bound(100, MAX_LISTED),
]


async def list_requests(request: Request) -> Response:
    """The requests of the caller's tenant, or everybody's for the administrator."""
    state, limit = request.query_params.get("state"), lists.limit(request, 100, MAX_LISTED)
    if state is not None and state not in _STATES:
        raise RequestError(f"state must be one of {', '.join(_STATES)}.", param="state")
    timeline = request.query_params.get("timeline", "false")
    if timeline not in ("true", "false"):
        raise RequestError("timeline must be true or false.", param="timeline")
    tracked = api_of(request).requests.newest(_tenant(request))
    found = zip(tracked, await _states(tracked), strict=True)
    wanted = [(one, told) for one, told in found if state in (None, told.state)]
    data = [told for _, told in wanted[:limit]]
    if timeline == "true":
        lives = await _timelines([one for one, _ in wanted[:limit]])
        data = [replace(told, timeline=mine) for told, mine in zip(data, lives, strict=True)]
    return json_response(RequestList(data=data, has_more=len(wanted) > limit))


async def get_request(request: Request) -> Response:
    """One request, by the `x-request-id` or the `id` of its answer, with its timeline."""
    tracked = _wanted(request)
    [state], [timeline] = await asyncio.gather(_states([tracked]), _timelines([tracked]))
    return json_response(replace(state, timeline=timeline))


async def cancel_request(request: Request) -> Response:
    """End a request: its seat is free within two steps, and its client gets an error in place of the rest. One that is
    over already stays as it is."""
    tracked = _wanted(request)
    tracked.cancel()
    _log.info("%s: request %s is cancelled", request.state.request_id, tracked.id)
    with contextlib.suppress(TimeoutError):  # a client that does not read delays only the last words to it
        async with asyncio.timeout(_PATIENCE):
            await tracked.over.wait()
    [timeline] = await _timelines([tracked])
    return json_response(replace(tracked.state([]), timeline=timeline))


async def _states(requests: list[Tracked]) -> list[RequestState]:
    """How requests stand. If the engine cannot say why they wait, they are told as running."""
    rids: dict[TextService, list[int]] = {}
    for tracked in requests:
        if tracked.rids:
            rids.setdefault(tracked.service, []).extend(tracked.rids)
    answers = await asyncio.gather(*(_why(service, numbers) for service, numbers in rids.items()))
    reasons = dict(zip(rids, answers, strict=True))
    return [tracked.state(reasons.get(tracked.service, [])) for tracked in requests]


async def _timelines(requests: Sequence[Tracked]) -> list[list[Life]]:
    """The lives of each request's sequences, without those that the engine cannot tell."""
    rids: dict[TextService, list[int]] = {}
    for tracked in requests:
        if tracked.sequences:
            rids.setdefault(tracked.service, []).extend(tracked.sequences)
    answers = await asyncio.gather(*(_lives(service, numbers) for service, numbers in rids.items()))
    lives = {(service, life.rid): life for service, found in zip(rids, answers, strict=True) for life in found}
    return [
        [life for rid in tracked.sequences if (life := lives.get((tracked.service, rid))) is not None]
        for tracked in requests
    ]


async def _lives(service: TextService, rids: list[int]) -> list[Life]:
    with contextlib.suppress(RopewayError, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            return await service.recall(*rids)
    return []


async def _why(service: TextService, rids: list[int]) -> list[Why]:
    with contextlib.suppress(RopewayError, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            return await service.why(*rids)
    return []


def _tenant(request: Request) -> str | None:
    return None if request.state.operator else str(request.state.tenant)


def _wanted(request: Request) -> Tracked:
    name = str(request.path_params["id"])
    found = api_of(request).requests.find(name, _tenant(request))
    if found is None:
        message = f"There is no request {shown(name)}, or no more. GET /v1/requests lists those of ten minutes."
        raise HttpError(404, message, code="request_not_found", param="id")
    return found
