"""/v1/batches: OpenAI's batches over files of requests."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from ropeway.api import lists
from ropeway.api.deferred import in_words, key_of
from ropeway.api.errors import HttpError, shown
from ropeway.api.files import EXPIRES
from ropeway.api.health import json_response
from ropeway.api.inside import Endpoint
from ropeway.api.limits import MAX_METADATA
from ropeway.api.parse import decode, ignored_header
from ropeway.api.state import api_of, jobs_of, read_body, tenant_of
from ropeway.api.urgency import Tier, Word, said
from ropeway.contract import Urgency
from ropeway.jobs.records import Batch

LIST_PARAMETERS: Final = lists.parameters(20, 100)
_WINDOW = r"^[1-9][0-9]{0,5}[smhd]$"
_KEY = Annotated[str, Meta(max_length=64)]
_VALUE = Annotated[str, Meta(max_length=512)]


class ExpiresAfter(Struct, frozen=True, kw_only=True):
    """Seconds from the file's creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=EXPIRES[0], le=EXPIRES[1])]


class BatchRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /v1/batches. What OpenAI does not have: other endpoints, other windows, `priority` and
    `service_tier`, and `callback_url`."""

    input_file_id: Annotated[str, Meta(description="A file that was uploaded with the purpose `batch`.")]
    endpoint: Annotated[Endpoint, Meta(description="The url of every line.")]
    completion_window: Annotated[
        Annotated[str, Meta(pattern=_WINDOW)],
        Meta(description="Time for all of it, such as `30m`, `24h` or `7d`; what has not run by then never does."),
    ]
    metadata: Annotated[
        Annotated[dict[_KEY, _VALUE], Meta(max_length=MAX_METADATA)] | None, Meta(description="Labels of your own.")
    ] = None
    output_expires_after: Annotated[
        ExpiresAfter | None, Meta(description="How long the files of answers are kept (default: 30 days).")
    ] = None
    priority: Annotated[
        Word | None, Meta(description="`medium` goes before `low`, which is the default; nothing is `high` here.")
    ] = None
    service_tier: Annotated[Tier | None, Meta(description="`flex` is `medium`.")] = None
    callback_url: Annotated[
        Annotated[str, Meta(max_length=2048)] | None, Meta(description="Where the end of the batch is announced.")
    ] = None


class BatchCounts(Struct, frozen=True):
    total: int
    completed: int
    failed: int


class BatchProblem(Struct, frozen=True):
    """`line` counts from 1."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchProblems(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchProblem]


class InputDetails(Struct, frozen=True):
    cached_tokens: int


class OutputDetails(Struct, frozen=True):
    reasoning_tokens: int


class BatchTokens(Struct, frozen=True):
    """Tokens of all answers."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchBody(Struct, frozen=True, kw_only=True):
    """A batch, as at OpenAI. Besides: `priority`, `callback_url`, and while it runs `position` and `eta_seconds` (with
    `estimated_completion`, the same in words): open requests until its last one, and the guess of the time they take.
    """

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchTokens | None
    metadata: dict[str, str] | None
    priority: Word
    callback_url: str | None
    position: int | None = None
    eta_seconds: float | None = None
    estimated_completion: str | None = None


class BatchList(lists.Listing[BatchBody], frozen=True, kw_only=True):
    """The newest first, unless `order` says otherwise; without places in the line."""


async def create_batch(request: Request) -> Response:
    """Work off a file of requests in the background. Its lines are checked afterwards: see `errors` of the batch."""
    api_of(request).check_open()
    body, ignored = decode(BatchRequest, await read_body(request), {})
    if body.callback_url is not None:
        jobs_of(request).rules.check_url(body.callback_url)
    urgency = said(getattr(request.state, "urgency", None), body.priority, body.service_tier)
    batch = await jobs_of(request).store.batches.create(
        tenant=tenant_of(request),
        key=key_of(request),
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        window=body.completion_window,
        urgency=Urgency.LOW if urgency is None else max(urgency, Urgency.MEDIUM),
        metadata=body.metadata,
        callback_url=body.callback_url or "",
        output_expires_after=body.output_expires_after.seconds if body.output_expires_after is not None else None,
    )
    response = json_response(await _body(request, batch))
    response.headers.update(ignored_header(ignored))
    return response


async def list_batches(request: Request) -> Response:
    """The caller's batches."""
    query = lists.query(request, 20, 100)
    found = await jobs_of(request).store.batches.list(
        tenant_of(request), after=query.after, limit=query.limit, order=query.order
    )
    data = [_described(batch) for batch in found.data]
    return json_response(BatchList.of(data, more=found.has_more))


async def get_batch(request: Request) -> Response:
    """How a batch stands."""
    name = str(request.path_params["batch_id"])
    batch = await jobs_of(request).store.batches.get(tenant_of(request), name)
    if batch is None:
        raise _unknown(name)
    return json_response(await _body(request, batch))


async def cancel_batch(request: Request) -> Response:
    """Run nothing more of a batch. What has been answered goes into its files; one that has ended stays as it is."""
    name = str(request.path_params["batch_id"])
    batch = await jobs_of(request).store.batches.cancel(tenant_of(request), name)
    if batch is None:
        raise _unknown(name)
    return json_response(await _body(request, batch))


async def _body(request: Request, batch: Batch) -> BatchBody:
    place = (None, None) if batch.status.ended else await jobs_of(request).place_of_batch(batch)
    return _described(batch, *place)


def _described(batch: Batch, position: int | None = None, eta: float | None = None) -> BatchBody:
    same: dict[str, Any] = {
        name: getattr(batch, name) for name in BatchBody.__struct_fields__ if name in Batch.__struct_fields__
    }
    errors, usage, counts = batch.errors, batch.usage, batch.counts
    problems = [BatchProblem(one.code, one.message, one.line, one.param) for one in errors or ()]
    return BatchBody(
        **same
        | {
            "completion_window": batch.window,
            "status": str(batch.status),
            "priority": batch.urgency.name.lower(),
            "callback_url": batch.callback_url or None,
            "errors": BatchProblems(data=problems) if problems else None,
            "position": position,
            "eta_seconds": eta,
            "estimated_completion": in_words(eta),
            "request_counts": BatchCounts(counts.total, counts.completed, counts.failed),
            "usage": usage
            and BatchTokens(
                usage.input_tokens,
                InputDetails(usage.cached_tokens),
                usage.output_tokens,
                OutputDetails(usage.reasoning_tokens),
                usage.input_tokens + usage.output_tokens,
            ),
        }
    )


def _unknown(name: str) -> HttpError:
    return HttpError(404, f"No batch found with id '{shown(name)}'.", code="batch_not_found", param="id")
