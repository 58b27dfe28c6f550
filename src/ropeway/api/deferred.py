"""Requests that nobody waits for: taken with a 202, kept on the disk, computed when there is room.

`Deferring` stands behind the gate. It lets the endpoint check a deferred request as it checks any other, and only then
takes it: what is wrong with a body is said now, not in an hour. The jobs that it makes are at /v1/jobs.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from msgspec import Raw, Struct
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.api import lists
from ropeway.api.answer import CHECK_ONLY
from ropeway.api.errors import HttpError, shown
from ropeway.api.health import json_response
from ropeway.api.inside import CALL, URLS, Asked, asked
from ropeway.api.parse import IGNORED_HEADER
from ropeway.api.state import jobs_of, read_body, replayed, tenant_of
from ropeway.api.urgency import Word, in_background
from ropeway.errors import RequestError
from ropeway.jobs.records import Item, is_id
from ropeway.jobs.work import Call

PATH: Final = "/v1/jobs"
LIST_PARAMETERS: Final = lists.parameters(20, 100)
_OTHER_BACKGROUND: Final = ("/v1/responses", "/v1/messages")
"""Where `background` is not another word for `deferred`: it means something else, or nothing."""

_STATES = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]


class JobResponse(Struct, frozen=True, kw_only=True):
    """What the request was answered: `body` is the answer that HTTP would have given."""

    status_code: int
    request_id: str
    body: Raw


class JobError(Struct, frozen=True):
    """Why there is no answer: `job_cancelled`, `job_expired`, `gave_up`."""

    code: str
    message: str


class Job(Struct, frozen=True, kw_only=True):
    """A deferred request.

    While it waits, `position` is its place in the line (1 = next) and `eta_seconds` the guess, from the pace of the
    last minutes, of when it is done; `estimated_completion` is the same in words. `response` is there once it has been
    answered, also if the answer is an error; then `status` is `failed`. Times are seconds since 1970. `task_id` is the
    `id`.
    """

    id: str
    object: Literal["job"] = "job"
    task_id: str
    status: _STATES
    endpoint: str
    priority: Word
    created_at: int
    expires_at: int
    started_at: int | None = None
    ended_at: int | None = None
    position: int | None = None
    eta_seconds: float | None = None
    estimated_completion: str | None = None
    callback_url: str | None = None
    response: JobResponse | None = None
    error: JobError | None = None


class JobList(lists.Listing[Job], frozen=True, kw_only=True):
    """Deferred requests by creation, without answers and places; the newest first unless `order` says otherwise."""


class DeletedJob(Struct, frozen=True):
    id: str
    object: Literal["job"] = "job"
    deleted: bool = True


class Deferring:
    """ASGI middleware: a request that says `deferred` becomes a job."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _concerns(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        body = await read_body(request)
        said = asked(body)
        if not deferral(scope["path"], said):
            await self._app(scope, replayed(body, receive), send)
            return
        # Every other field has been checked when the endpoint has nothing to say against it.
        scope["state"][CHECK_ONLY] = True
        fine: list[Headers] = []

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 204:
                fine.append(Headers(raw=message["headers"]))
            if not fine:
                await send(message)

        await self._app(scope, replayed(body, receive), tell)
        if fine:
            response = await _accept(request, body, said)
            if IGNORED_HEADER in fine[0]:
                response.headers[IGNORED_HEADER] = fine[0][IGNORED_HEADER]
            await response(scope, receive, send)


def _concerns(scope: Scope) -> bool:
    """Whether a request may ask to be deferred, and has not been asked for from inside."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in URLS:
        return False
    return CALL not in scope and CHECK_ONLY not in scope["state"]


def deferral(path: str, said: Asked) -> bool:
    """Whether a request is to be deferred. Raises RequestError for what cannot be deferred.

    A response in the background is another thing: it begins at once.
    """
    if said.deferred is not True and (path in _OTHER_BACKGROUND or said.background is not True):
        if path == "/v1/responses" and said.background is True:
            return False
        if said.callback_url is not None:
            message = "callback_url is called when a job has ended; send it together with deferred: true."
            raise RequestError(message, param="callback_url")
        return False
    if said.stream is True:
        raise RequestError("A deferred request has nobody to read a stream; leave stream out.", param="stream")
    if path == "/v1/responses" and said.background is True:
        message = "deferred and background exclude each other: deferred waits for its turn, background begins at once."
        raise RequestError(message, param="background")
    return True


async def get_job(request: Request) -> Response:
    """A deferred request: where it stands, or what was answered."""
    name = _asked_for(request)
    item = await jobs_of(request).store.items.get(tenant_of(request), name)
    if item is None:
        raise _unknown(name)
    return json_response(await _job(request, item))


async def list_jobs(request: Request) -> Response:
    """The caller's deferred requests."""
    query = lists.query(request, 20, 100)
    found = await jobs_of(request).store.items.list(
        tenant_of(request), after=query.after, limit=query.limit, order=query.order
    )
    data = [_described(item) for item in found.data]
    return json_response(JobList.of(data, more=found.has_more))


async def cancel_job(request: Request) -> Response:
    """End a deferred request. One that has ended stays as it is."""
    name = _asked_for(request)
    item = await jobs_of(request).store.items.cancel(tenant_of(request), name)
    if item is None:
        raise _unknown(name)
    return json_response(await _job(request, item))


async def delete_job(request: Request) -> Response:
    """Forget a deferred request and its answer; one that has not ended is cancelled."""
    name = _asked_for(request)
    if not await jobs_of(request).store.items.delete(tenant_of(request), name):
        raise _unknown(name)
    return json_response(DeletedJob(name))


def in_words(seconds: float | None) -> str | None:
    """A guess of so many seconds as a range, since that is all that it is: "5-8 minutes"."""
    if seconds is None:
        return None
    low, high = 0.8 * seconds, 1.3 * seconds + 1
    for name, size in (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400)):
        if high < 90 * size or name == "days":
            return f"{math.floor(low / size)}-{math.ceil(high / size)} {name}"
    raise AssertionError("days have no bound")


async def _accept(request: Request, body: bytes, said: Asked) -> Response:
    state = request.state
    callback_url = callback_of(request, body)
    call = Call(
        url=str(request.scope["path"]),
        body=body,
        urgency=in_background(getattr(state, "urgency", None), said.priority, said.service_tier),
        tenant=str(state.tenant),
        key=key_of(request),
    )
    item = await jobs_of(request).defer(call, callback_url=callback_url)
    job = await _job(request, item)
    response = json_response(job, 202)
    response.headers["location"] = f"{PATH}/{job.id}"
    return response


async def _job(request: Request, item: Item) -> Job:
    place = (None, None) if item.state.ended else await jobs_of(request).place_of_item(item)
    return _described(item, *place)


def _described(item: Item, position: int | None = None, eta: float | None = None) -> Job:
    reply, error = item.reply, item.error
    return Job(
        id=item.name,
        task_id=item.name,
        status=item.status,  # type: ignore[arg-type]
        endpoint=item.url,
        priority=item.urgency.name.lower(),  # type: ignore[arg-type]
        created_at=int(item.created_at),
        expires_at=int(item.expires_at),
        started_at=_whole(item.started_at),
        ended_at=_whole(item.ended_at),
        position=position,
        eta_seconds=eta,
        estimated_completion=in_words(eta),
        callback_url=item.callback_url or None,
        response=JobResponse(status_code=reply.status, request_id=reply.request_id, body=Raw(reply.body))
        if reply is not None
        else None,
        error=JobError(error.code, error.message) if error is not None else None,
    )


def callback_of(request: Request, body: bytes) -> str:
    """Who is to be told of the end of a request; empty if nobody. Raises RequestError for where nothing may be sent."""
    url = asked(body).callback_url
    if url is None:
        return ""
    if not isinstance(url, str):
        raise RequestError("callback_url must be a string.", param="callback_url")
    jobs_of(request).rules.check_url(url)
    return url


def key_of(request: Request) -> str:
    """The id of the key that a job is accounted to; empty where keys have no accounts."""
    account = getattr(request.state, "account", None)
    return str(account.id) if account is not None else ""


def _asked_for(request: Request) -> str:
    """Raises HttpError (404) for the id of something else, such as a response."""
    name = str(request.path_params["job_id"])
    if not is_id("job_", name):
        raise _unknown(name)
    return name


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _unknown(name: str) -> HttpError:
    message = f"There is no job {shown(name)}, or no more (--job-retention). GET /v1/jobs lists those there are."
    return HttpError(404, message, code="job_not_found", param="id")
