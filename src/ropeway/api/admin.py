"""What an operator may ask of a running server. The gate lets nobody in here without the administrator's key."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.health import json_response
from ropeway.api.parse import decode, ignored_header
from ropeway.api.schema import SchedulerChange, SchedulerState
from ropeway.api.state import api_of, read_body

_log = logging.getLogger(__name__)


async def get_scheduler(request: Request) -> Response:
    """By which policy requests board, and how many wait."""
    now = await api_of(request).service.reorder()
    return json_response(SchedulerState(now.policy, now.waiting))


async def put_scheduler(request: Request) -> Response:
    """Let requests, also those that wait, board by another policy from the next step on. A restart undoes it."""
    body, ignored = decode(SchedulerChange, await read_body(request), {})
    now = await api_of(request).service.reorder(body.policy)
    _log.info("%s: scheduling policy %s, %d requests wait", request.state.request_id, now.policy, now.waiting)
    response = json_response(SchedulerState(now.policy, now.waiting))
    response.headers.update(ignored_header(ignored))
    return response
