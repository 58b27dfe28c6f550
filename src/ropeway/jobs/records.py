"""What durable work is made of: files, batches, items; their states, and which state may follow which.

A batch is a group of items; a deferred request is an item without a batch. States and fields of batches are OpenAI's
(https://platform.openai.com/docs/api-reference/batch). Times are seconds of the wall clock since 1970: they are shown,
and they outlive the machine's uptime.
"""

from __future__ import annotations

import re
import uuid
from enum import IntEnum, StrEnum
from hashlib import blake2b
from typing import Final, Generic, TypeVar

from msgspec import Raw, Struct

from ropeway.contract import Urgency
from ropeway.errors import RequestError
from ropeway.jobs.work import Reply

T = TypeVar("T")

_IDS: Final = {
    kind: re.compile(rf"{kind}[0-9a-f]{{32}}", re.ASCII) for kind in ("file-", "batch_", "batch_req_", "job_", "resp_")
}
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_UNIT: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WINDOW_SECONDS: Final = (10, 30 * 86400)
"""The shortest and the longest completion window."""


def new_id(kind: str) -> str:
    """A fresh id that begins with `kind`: "file-", "batch_" or "job_"."""
    return kind + uuid.uuid4().hex


def derived_id(kind: str, *parts: object) -> str:
    """The id that always belongs to `parts`: work that is repeated after a crash comes to the same name."""
    return kind + blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def is_id(kind: str, text: str) -> bool:
    """Whether `text` is an id of that kind, and nothing else: only such a text may become part of a path."""
    return _IDS[kind].fullmatch(text) is not None


def window_seconds(text: str) -> int:
    """Seconds of a completion window such as "24h", "30m" or "7d". Raises RequestError."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT[found[2]] if found else 0
    low, high = WINDOW_SECONDS
    if not low <= seconds <= high:
        raise RequestError(
            f"completion_window must be a number of seconds, minutes, hours or days from {low}s to {high // 86400}d, "
            'such as "24h", "30m" or "7d".',
            param="completion_window",
        )
    return seconds


class ItemState(IntEnum):
    """Where an item stands. Below DONE it is open; from DONE on it has ended, and nothing moves it any more."""

    WAITING = 0
    LEASED = 1
    DONE = 2
    """Answered with a status below 400."""
    FAILED = 3
    """Answered with another status, or given up: then it has an `error`."""
    CANCELLED = 4
    EXPIRED = 5

    @property
    def ended(self) -> bool:
        return self >= ItemState.DONE


class BatchState(StrEnum):
    """OpenAI's words. `finalizing` and `cancelling` are the times in which the files are put together."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return not MOVES[self]


MOVES: Final[dict[BatchState, frozenset[BatchState]]] = {
    state: frozenset(map(BatchState, then.split()))
    for state, then in {
        BatchState.VALIDATING: "failed in_progress cancelling expired",
        BatchState.IN_PROGRESS: "finalizing cancelling",
        BatchState.FINALIZING: "completed expired",
        BatchState.CANCELLING: "cancelled",
        BatchState.FAILED: "",
        BatchState.COMPLETED: "",
        BatchState.EXPIRED: "",
        BatchState.CANCELLED: "",
    }.items()
}
"""What may follow a state. Nothing follows an end, and nothing leads back."""


class LineError(Struct, frozen=True, omit_defaults=True):
    """Why a batch failed in validation: OpenAI's shape. `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class ItemError(Struct, frozen=True):
    """Why an item has no answer: `batch_expired`, `batch_cancelled`, `gave_up` and the like for deferred requests."""

    code: str
    message: str


class OutputResponse(Struct, frozen=True):
    status_code: int
    request_id: str
    body: Raw


class OutputLine(Struct, frozen=True):
    """A line of a file of answers, as OpenAI's batches have it; `error` if there is no answer."""

    id: str
    custom_id: str | None
    response: OutputResponse | None
    error: ItemError | None


class FileRecord(Struct, frozen=True, kw_only=True):
    """A file that was uploaded (`purpose` "batch") or made (`batch_output`). Its name is text, never a path."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None


class Counts(Struct, frozen=True):
    """Requests of a batch. `failed` are those whose answer is an error; what never ran is in neither."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Usage(Struct, frozen=True):
    """Tokens of all answers of a batch."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Batch(Struct, frozen=True, kw_only=True):
    """A batch as its row has it; `*_at` are whole seconds, None while the state was not reached.

    `window` is the completion window as it was asked for. `number` orders batches by creation and is internal.
    """

    number: int
    id: str
    tenant: str
    key: str
    endpoint: str
    input_file_id: str
    window: str
    urgency: Urgency
    status: BatchState
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    callback_url: str = ""
    output_expires_after: int | None = None
    model: str | None = None
    errors: list[LineError] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    counts: Counts = Counts()
    usage: Usage | None = None


class Item(Struct, frozen=True, kw_only=True):
    """One request of a batch or a deferred one. `id` is internal; clients know `name` (`batch_req_...`, `job_...`).

    `reply` is the answer once there is one, `error` says why there will be none. `started_at` is when it was leased
    last.
    """

    id: int
    name: str
    tenant: str
    key: str
    url: str
    urgency: Urgency
    state: ItemState
    attempt: int
    created_at: float
    expires_at: float
    callback_url: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    reply: Reply | None = None
    error: ItemError | None = None

    @property
    def status(self) -> str:
        """What a client is told of a deferred request."""
        return _STATUS[self.state]


_STATUS: Final = {
    ItemState.WAITING: "queued",
    ItemState.LEASED: "in_progress",
    ItemState.DONE: "completed",
    ItemState.FAILED: "failed",
    ItemState.CANCELLED: "cancelled",
    ItemState.EXPIRED: "expired",
}


class Page(Struct, Generic[T], frozen=True):
    """Part of a list, in the order asked for, and whether it goes on."""

    data: list[T]
    has_more: bool
