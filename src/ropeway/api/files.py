"""/v1/files: what batches read and write. A file streams to the disk as it comes, and from there as it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, BinaryIO, Final, Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway.api import lists
from ropeway.api.errors import HttpError, shown
from ropeway.api.health import json_response
from ropeway.api.multipart import Multipart, Part, boundary_of
from ropeway.api.state import Api, api_of, jobs_of, tenant_of
from ropeway.errors import RequestError
from ropeway.jobs.files import Draft
from ropeway.jobs.records import FileRecord

PATH: Final = "/v1/files"
FORM_BYTES: Final = 64 * 1024
"""What a form may have besides the file."""

EXPIRES: Final = (3600, 2_592_000)
"""Seconds that a file may ask to be kept, as at OpenAI."""

LIST_PARAMETERS: Final = [
    *lists.parameters(10_000, 10_000),
    {"name": "purpose", "in": "query", "schema": {"type": "string"}},
]
_MAX_FIELD = 1024
_MAX_NAME = 255
_CHUNK = 256 * 1024
_AT_ONCE = 1024 * 1024
"""Bytes that are written together: each write is a visit to another thread."""

UPLOAD: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "JSON lines; its name ends .jsonl."},
                    "purpose": {"const": "batch"},
                    "expires_after[anchor]": {"const": "created_at"},
                    "expires_after[seconds]": {"type": "integer", "minimum": EXPIRES[0], "maximum": EXPIRES[1]},
                },
            }
        }
    },
}
"""The form, for the description."""


class FileBody(Struct, frozen=True, kw_only=True):
    """A file. `purpose` is `batch` for input, `batch_output` for what a batch has made."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(lists.Listing[FileBody], frozen=True, kw_only=True):
    """Files by creation, the newest first unless `order` says otherwise."""


class DeletedFile(Struct, frozen=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


async def upload_file(request: Request) -> Response:
    """Keep a file of requests for a batch."""
    api, store = api_of(request), jobs_of(request).store
    api.check_open()
    form = Multipart(boundary_of(request.headers.get("content-type", "")))
    with await asyncio.to_thread(store.files.draft) as draft:
        upload = _Upload(draft, _limit(api))
        async for data in _arriving(request):
            for part, piece in form.feed(data):
                await upload.take(part, piece)
        form.close()
        await upload.flush()
        filename, purpose, expires_after = upload.understand()
        record = await store.files.add(
            draft, tenant=tenant_of(request), filename=filename, purpose=purpose, expires_after=expires_after
        )
    return json_response(_body(record))


async def list_files(request: Request) -> Response:
    """The caller's files."""
    asked, purpose = lists.query(request, 10_000, 10_000), request.query_params.get("purpose")
    found = await jobs_of(request).store.files.list(
        tenant_of(request), after=asked.after, limit=asked.limit, order=asked.order, purpose=purpose
    )
    data = [_body(record) for record in found.data]
    return json_response(FileList.of(data, more=found.has_more))


async def get_file(request: Request) -> Response:
    """A file, without its content."""
    return json_response(_body(await _wanted(request)))


async def get_content(request: Request) -> Response:
    """The bytes of a file."""
    record = await _wanted(request)
    try:
        file = await asyncio.to_thread(jobs_of(request).store.files.path(record.id).open, "rb")
    except FileNotFoundError:  # it was deleted in this moment
        raise _unknown(record.id) from None
    return Content(file, record, api_of(request).config.stream_timeout)


async def delete_file(request: Request) -> Response:
    """Forget a file. One that a batch still reads is refused."""
    name = str(request.path_params["file_id"])
    if not await jobs_of(request).store.files.delete(tenant_of(request), name):
        raise _unknown(name)
    return json_response(DeletedFile(name))


class Content(Response):
    """A file as it is read. Whoever takes nothing of it for `patience` seconds is dropped."""

    def __init__(self, file: BinaryIO, record: FileRecord, patience: float) -> None:
        name = f'attachment; filename="{record.id}.jsonl"'
        super().__init__(headers={"content-disposition": name}, media_type="application/octet-stream")
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.raw_headers.append((b"content-length", str(record.bytes).encode()))
        self._file = file
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            more = True
            while more:
                data = await asyncio.to_thread(self._file.read, _CHUNK)
                more = bool(data)
                async with asyncio.timeout(self._patience):
                    await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            abort = scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
        finally:
            self._file.close()


class _Upload:
    """What a form says, and where its file goes. Raises RequestError or HttpError for what does not fit."""

    def __init__(self, draft: Draft, limit: int) -> None:
        self._draft = draft
        self._limit = limit
        self._fields: dict[str, bytes] = {}
        self._file: Part | None = None
        self._pieces: list[bytes] = []
        self._held = 0

    async def take(self, part: Part, data: bytes) -> None:
        if part.name == "file":
            if self._file not in (None, part):
                raise RequestError("Send one file in a request.", param="file")
            self._file = part
            self._pieces.append(data)
            self._held += len(data)
            if self._draft.size + self._held > self._limit:
                raise too_large(self._limit)
            if self._held >= _AT_ONCE:
                await self.flush()
            return
        known = self._fields.get(part.name, b"") + data
        if len(known) > _MAX_FIELD:
            raise RequestError(f"A field of the form is longer than {_MAX_FIELD} bytes.", param=part.name[:64])
        self._fields[part.name] = known

    async def flush(self) -> None:
        pieces, self._pieces, self._held = self._pieces, [], 0
        await asyncio.to_thread(self._draft.write, b"".join(pieces))

    def understand(self) -> tuple[str, str, int | None]:
        """Name, purpose, and seconds to be kept."""
        if self._file is None:
            raise RequestError("Missing required field 'file'.", param="file")
        filename = self._file.filename
        if not filename or len(filename) > _MAX_NAME or not filename.isprintable():
            message = f"The file needs a name of at most {_MAX_NAME} printable characters."
            raise RequestError(message, param="file")
        purpose = self._text("purpose")
        if purpose != "batch":
            raise RequestError("purpose must be 'batch': this server keeps files for batches alone.", param="purpose")
        if not filename.endswith(".jsonl"):
            raise RequestError("Invalid file format for Batch API. Must be .jsonl", param="file")
        return filename, purpose, self._expires_after()

    def _expires_after(self) -> int | None:
        anchor, seconds = (self._text(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise RequestError("The anchor of expires_after must be 'created_at'.", param="expires_after[anchor]")
        low, high = EXPIRES
        number = int(seconds) if seconds and seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else 0
        if not low <= number <= high:
            message = f"The seconds of expires_after must be a whole number from {low} to {high}."
            raise RequestError(message, param="expires_after[seconds]")
        return number

    def _text(self, name: str) -> str | None:
        found = self._fields.get(name)
        return None if found is None else found.decode("utf-8", "replace")


def too_large(limit: int) -> HttpError:
    """`limit` in bytes."""
    return HttpError(
        413,
        f"The file is larger than {limit / 1024 / 1024:g} MiB. Split it, or start the server with a higher "
        "--max-file-mib.",
        code="request_too_large",
        param="file",
    )


async def _arriving(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "The client left before its file was complete.", close=True)
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _wanted(request: Request) -> FileRecord:
    name = str(request.path_params["file_id"])
    found = await jobs_of(request).store.files.get(tenant_of(request), name)
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> HttpError:
    return HttpError(404, f"No such File object: {shown(name)}", code="file_not_found", param="id")


def _body(record: FileRecord) -> FileBody:
    return FileBody(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose="batch_output" if record.purpose == "batch_output" else "batch",
    )


def _limit(api: Api) -> int:
    return int(api.config.max_file_mib * 1024 * 1024)
