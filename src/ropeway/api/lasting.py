"""Responses in the background, as the tables have them: what outlives the process that began them.

While that process lives, the response store knows such a response better: it has what there is of the answer so far.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

from ropeway.api.response_store import Entry, Turn
from ropeway.jobs.records import Item, ItemState, is_id
from ropeway.jobs.running import Jobs
from ropeway.jobs.work import NOT_JSON

_MADE: Final = ("status", "output", "usage", "error", "incomplete_details", "completed_at", "model")
"""Fields of a response that are known when it has ended. All others are as they were when it was taken."""

_NO_OUTPUT: Final = b'{"output":[]}'
encode = msgspec.json.encode


class Note(Struct, frozen=True):
    """What is written down with the request of a response: its body when it was taken, its own input, and the
    conversation that it continues."""

    head: dict[str, Any]
    input: list[Any]
    before: list[Any]


class _Said(Struct, frozen=True):
    message: str = ""


class _Answer(Struct, frozen=True):
    """A response, or the error that came in place of one."""

    object: str = ""
    error: _Said | None = None


async def find(jobs: Jobs, tenant: str, name: str) -> Entry | None:
    """The response of that id, if it was made in the background and is kept."""
    if not jobs.store.exists or not is_id("resp_", name):
        return None
    found = await jobs.store.items.noted(tenant, name)
    if found is None:
        return None
    item, note = found[0], msgspec.json.decode(found[1], type=Note)
    body = encode(_body(item, note.head))

    async def cancel() -> None:
        await jobs.store.items.cancel(tenant, name)

    return Entry(
        id=name,
        tenant=tenant,
        input=encode(note.input),
        before=Turn(encode(note.before), _NO_OUTPUT) if note.before else None,
        background=True,
        render=lambda: body,
        cancel=cancel,
        body=body if item.state.ended else None,
    )


def _body(item: Item, head: dict[str, Any]) -> dict[str, Any]:
    """The response as a client sees it."""
    if not item.state.ended:
        return {**head, "status": "queued" if item.state is ItemState.WAITING else "in_progress"}
    if item.state is ItemState.CANCELLED:
        return {**head, "status": "cancelled"}
    if item.reply is None:
        return {**head, "status": "failed", "error": _error(item.error.message if item.error is not None else "")}
    try:
        answer = msgspec.json.decode(item.reply.body, type=_Answer)
    except NOT_JSON:  # another server's answer may be anything
        answer = _Answer()
    if answer.object == "response":
        made = msgspec.json.decode(item.reply.body)
        return {**head, **{name: made[name] for name in _MADE if name in made}}
    return {**head, "status": "failed", "error": _error(answer.error.message if answer.error is not None else "")}


def _error(message: str) -> dict[str, str]:
    return {"code": "server_error", "message": message}
