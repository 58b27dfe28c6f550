"""What happens to a batch besides its requests: its input is checked and taken in, its time ends, its files are made.

Every step may be cut off anywhere and is begun again from what the tables say, by whoever comes first: what has been
taken in is not taken in twice, and the files of a batch always get the same names and the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from ropeway.errors import RopewayError
from ropeway.jobs import inputs
from ropeway.jobs.batches import output_lives
from ropeway.jobs.failpoints import failpoint
from ropeway.jobs.files import Draft
from ropeway.jobs.items import request_name
from ropeway.jobs.records import (
    Batch,
    BatchState,
    Counts,
    FileRecord,
    ItemError,
    ItemState,
    LineError,
    OutputLine,
    OutputResponse,
    Usage,
    derived_id,
)
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import NOT_JSON

log = logging.getLogger("ropeway.jobs")

_LOOK_SECONDS: Final = 60.0
"""How often the tables are looked through for what another process left or put there."""

_TROUBLE_SECONDS: Final = 5.0
_ROWS: Final = 64


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Used(msgspec.Struct):
    usage: _Tokens | None = None


class Assembled(msgspec.Struct):
    """What the rows of a batch came to."""

    files: list[FileRecord]
    counts: Counts
    usage: Usage
    expired: bool


class Keeper:
    """Carries the batches of `store` on, and drops what is kept no longer.

    `most` requests may be in a batch, of `longest` bytes each; `serves` knows the models; deferred requests are kept
    `keep_s` seconds after they have ended.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        most: int = 50_000,
        longest: int = 16 << 20,
        keep_s: float = 72 * 3600.0,
        serves: Callable[[str], bool] = lambda model: True,
    ) -> None:
        self._store = store
        self._most = most
        self._longest = longest
        self._keep_s = keep_s
        self._serves = serves
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""
        self._ending = threading.Event()

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Leave everything as it is. Idempotent."""
        self._ending.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        progress = self._store.progress
        while True:
            seen = progress.count
            pause = _LOOK_SECONDS
            if self._store.exists:
                try:
                    following = await self.round()
                    pause = min(_LOOK_SECONDS, max(0.05, following - self._store.clock()))
                    self._trouble = ""
                except Exception as error:  # a full disk, or a fault of ours: both are tried again
                    pause = _TROUBLE_SECONDS
                    self._say(error)
            await progress.wait(seen, pause)

    async def round(self) -> float:
        """Do everything that is due. Returns when there is more of it, in seconds of the wall clock. Raises the first
        of what went wrong, after everything else was done."""
        store = self._store
        now = store.clock()
        following = [await store.batches.expire(), await store.items.sweep(self._keep_s), await store.files.sweep()]
        await store.files.sweep_orphans(asyncio.get_running_loop().time())
        troubles: list[Exception] = []
        for batch in await store.batches.todo():
            try:
                await self._carry_on(batch)
            except Exception as error:  # one whose file cannot be read must not hold up the others
                troubles.append(error)
        if await store.batches.clear():
            following.append(now)
        if troubles:
            raise troubles[0]
        return min((time for time in following if time is not None), default=now + _LOOK_SECONDS)

    async def _carry_on(self, batch: Batch) -> None:
        progress = await self._store.batches.progress(batch)
        if batch.status is BatchState.VALIDATING:
            await self._validate(batch)
        elif progress.lines < progress.total:
            await self._load(batch)
        else:
            await self._finalise(batch)

    async def _validate(self, batch: Batch) -> None:
        batches = self._store.batches
        try:
            checked = await asyncio.to_thread(
                inputs.check, self._store.files.path(batch.input_file_id), endpoint=batch.endpoint, most=self._most,
                longest=self._longest, serves=self._serves, wanted=lambda: not self._ending.is_set(),
            )  # fmt: skip
        except FileNotFoundError:
            await batches.reject(batch, [LineError("input_file_not_found", "The input file is not there any more.")])
            return
        if self._ending.is_set():
            return
        if checked.errors:
            await batches.reject(batch, checked.errors)
        elif await batches.accept(batch, total=checked.total, model=checked.model):
            await self._load(batch)

    async def _load(self, batch: Batch) -> None:
        at = await self._store.batches.progress(batch)
        path = self._store.files.path(batch.input_file_id)
        portions = inputs.portions(path, endpoint=batch.endpoint, longest=self._longest, begin=at.loaded, line=at.line)
        while (portion := await asyncio.to_thread(next, portions, None)) is not None:
            lines, ends = portion
            now_at = await self._store.batches.load(batch, at, lines, ends)
            if now_at.loaded != ends:
                return  # another process takes it in; the next round sees how far
            at = now_at
            failpoint("load")
        # What was cancelled meanwhile has no item left to end it.
        self._store.progress.tell()

    async def _finalise(self, batch: Batch) -> None:
        failpoint("finalise")
        owner = await self._store.owner()
        made = await self._store.read(lambda c: assemble(self._store, c, batch, owner))
        if await self._store.batches.complete(
            batch, made.files, counts=made.counts, usage=made.usage, expired=made.expired
        ):
            total = made.counts.total
            log.info("%s has ended: %d of %d requests went well.", batch.id, made.counts.completed, total)

    def _say(self, error: Exception) -> None:
        if self._trouble != str(error):
            self._trouble = str(error)
            log.warning("Batches wait: %s", error, exc_info=None if isinstance(error, RopewayError) else error)


def assemble(store: JobStore, c: sqlite3.Connection, batch: Batch, owner: str) -> Assembled:
    """Write the files of a batch all of whose items have ended, in the order of its lines: answers, and errors."""
    counts = dict.fromkeys(ItemState, 0)
    usage = Usage()
    files: list[FileRecord] = []
    rows = c.execute(
        "SELECT items.*, replies.status, replies.request_id, replies.body FROM items "
        "LEFT JOIN replies ON replies.item = items.id WHERE batch = ? ORDER BY line",
        (batch.number,),
    )
    with store.files.draft() as output, store.files.draft() as errors:
        for number, row in enumerate(rows):
            if number % _ROWS == 0:
                time.sleep(0.0005)  # let those go on who stream to people
            state = ItemState(row["state"])
            counts[state] += 1
            (output if state is ItemState.DONE else errors).write(_line(row, request_name(row, owner)))
            if row["body"] is not None:
                usage = _more(usage, row["body"])
        for draft, purpose, name in ((output, "batch_output", "output"), (errors, "batch_error", "error")):
            if draft.size:
                files.append(_keep(store, draft, batch, purpose, name))
    total = sum(counts.values())
    return Assembled(
        files, Counts(total, counts[ItemState.DONE], counts[ItemState.FAILED]), usage, counts[ItemState.EXPIRED] > 0
    )


def _keep(store: JobStore, draft: Draft, batch: Batch, purpose: str, name: str) -> FileRecord:
    file_id = derived_id("file-", batch.id, name)
    draft.keep(file_id)
    now = int(store.clock())
    return FileRecord(
        id=file_id, tenant=batch.tenant, filename=f"{batch.id}_{name}.jsonl", purpose=purpose, bytes=draft.size,
        created_at=now, expires_at=now + output_lives(batch),
    )  # fmt: skip


def _line(row: sqlite3.Row, name: str) -> bytes:
    answer = None
    if row["body"] is not None:
        answer = OutputResponse(row["status"], row["request_id"], msgspec.Raw(row["body"]))
    error = ItemError(row["code"], row["message"]) if answer is None else None
    return msgspec.json.encode(OutputLine(name, row["custom_id"], answer, error)) + b"\n"


def _more(usage: Usage, body: bytes) -> Usage:
    try:
        found = msgspec.json.decode(body, type=_Used).usage
    except NOT_JSON:
        return usage  # usage of another shape is not counted
    if found is None:
        return usage
    read = found.prompt_tokens_details or found.input_tokens_details
    written = found.completion_tokens_details or found.output_tokens_details
    return Usage(
        usage.input_tokens + found.prompt_tokens + found.input_tokens,
        usage.output_tokens + found.completion_tokens + found.output_tokens,
        usage.cached_tokens + (read.cached_tokens if read else 0),
        usage.reasoning_tokens + (written.reasoning_tokens if written else 0),
    )
