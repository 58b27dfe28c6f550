"""What an operator may ask of a running server. The gate lets nobody in here without the administrator's key."""

from __future__ import annotations

import dataclasses
import logging

from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.health import json_response
from ropeway.api.limits import MAX_LABEL
from ropeway.api.parse import decode, ignored_header
from ropeway.api.schema import (
    PinList,
    PinRequest,
    PinState,
    QueueState,
    SchedulerChange,
    SchedulerState,
    WaitState,
)
from ropeway.api.state import api_of, read_body
from ropeway.api.tokens import prompt_only
from ropeway.contract import Pinned
from ropeway.errors import RequestError

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


async def get_queue(request: Request) -> Response:
    """What each waiting request waits for, and how long it is expected to."""
    reasons = await api_of(request).service.why()
    error = reasons[0].eta_error if reasons else None
    waiting = [WaitState(why.rid, why.position + 1, why.holder, why.reason, why.eta_s) for why in reasons]
    return json_response(QueueState(waiting, error))


async def get_pins(request: Request) -> Response:
    """Which prefixes stay cached."""
    return json_response(_listing(await api_of(request).service.pin()))


async def put_pin(request: Request) -> Response:
    """Compute a prefix now, and keep it cached under a name until that is deleted or the server ends."""
    api = api_of(request)
    body, ignored = decode(PinRequest, await read_body(request), {})
    api.check_model(body.model)
    prefix = prompt_only(body, str(request.state.request_id))
    whose = dataclasses.replace(prefix, tenant=body.tenant or "", salt=body.cache_salt or "")
    name = _name(request)
    response = json_response(_listing(await api.service.pin(name, whose)))
    _log.info("%s: prefix %s is pinned", request.state.request_id, name)
    response.headers.update(ignored_header(ignored))
    return response


async def delete_pin(request: Request) -> Response:
    """Let a prefix be lost as others are."""
    name = _name(request)
    response = json_response(_listing(await api_of(request).service.pin(name)))
    _log.info("%s: prefix %s is pinned no more", request.state.request_id, name)
    return response


def _name(request: Request) -> str:
    name = str(request.path_params["name"])
    if not name.isprintable() or len(name) > MAX_LABEL:
        raise RequestError(f"A pin's name has at most {MAX_LABEL} printable characters.", param="name")
    return name


def _listing(pins: list[Pinned]) -> PinList:
    return PinList([PinState(pin.name, pin.tokens, pin.blocks, pin.cached) for pin in pins])
