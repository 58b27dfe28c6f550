"""The input of a batch: a file with one request in each line, read a line at a time, however large it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import msgspec

from ropeway.jobs.batches import Line
from ropeway.jobs.records import LineError
from ropeway.jobs.work import NOT_JSON

MOST_ERRORS: Final = 100
"""Errors after which nobody reads on."""

_BREATH: Final = 1 << 18
"""Bytes after which this thread lets others go on: those that stream to people."""


class Checked(msgspec.Struct, frozen=True):
    """What an input is: `total` requests for `model`, or what is wrong with it."""

    total: int
    model: str | None
    errors: list[LineError]


class _Request(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    model: Any = None
    stream: Any = None


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class Raw(msgspec.Struct, frozen=True):
    """A line of a file that is not empty: its `number`, where it `ends`, its bytes, or None if it is too long."""

    number: int
    ends: int
    data: bytes | None


def raw_lines(path: Path, *, longest: int, begin: int = 0) -> Iterator[Raw]:
    """Lines of the file from byte `begin` on, which begins a line; `number` counts from there. Line ends may be
    Windows', and a byte order mark is none of the text. Raises OSError."""
    read = ends = number = 0
    with path.open("rb") as file:
        file.seek(begin)
        ends = begin
        while data := file.readline(longest + 2):
            number += 1
            ends += len(data)
            whole = len(data.rstrip(b"\r\n")) <= longest
            last = data
            while not last.endswith(b"\n") and (last := file.readline(1 << 20)):
                ends += len(last)
                whole = False
            if begin == 0 and number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            data = data.strip(b" \t\r\n")
            read += len(data)
            if read > _BREATH:
                read = 0
                time.sleep(0.0005)
            if data:
                yield Raw(number, ends, data if whole else None)


def check(
    path: Path,
    *,
    endpoint: str,
    most: int,
    longest: int,
    serves: Callable[[str], bool] = lambda model: True,
    wanted: Callable[[], bool] = lambda: True,
) -> Checked:
    """Read the whole input, and say what is wrong with each line as OpenAI does. Blocks. Raises OSError.

    `most` requests, each line of `longest` bytes at most; `serves` says whether a model exists; nobody reads on once
    the answer is not `wanted` any more.
    """
    errors: list[LineError] = []
    seen: dict[bytes, int] = {}
    model: str | None = None
    total = 0
    for raw in raw_lines(path, longest=longest):
        total += 1
        if total > most:
            message = f"The file has more than {most} requests, which is the most for one batch. Split it."
            errors.append(LineError("too_many_tasks", message))
            break
        try:
            custom_id, body, _ = _parsed(raw, endpoint, longest)
            mark = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if mark in seen:
                message = f"The custom_id of this line is also that of line {seen[mark]}; each must be unique."
                raise _Wrong("duplicate_custom_id", message, "custom_id")
            seen[mark] = raw.number
            model = model or _model(body, serves)
            if body.model != model:
                message = f"This line asks for another model than those before it, {model[:64]!r}. Use one in a file."
                raise _Wrong("model_mismatch", message, "body.model")
        except _Wrong as wrong:
            errors.append(LineError(wrong.code, wrong.message, raw.number, wrong.param))
            if len(errors) >= MOST_ERRORS:
                break
        if total % 256 == 0 and not wanted():
            break
    if total == 0:
        errors.append(LineError("empty_file", "The file has no requests. Put one in each line, as a JSON object."))
    return Checked(total, model, errors)


def portions(
    path: Path, *, endpoint: str, longest: int, begin: int, line: int, most: int = 1000, size: int = 4 << 20
) -> Iterator[tuple[list[Line], int]]:
    """The requests of an input that has been checked, from byte `begin` on, which follows line `line`: in portions of
    `most` requests or `size` bytes, each with the byte at which it ends. Raises OSError."""
    portion: list[Line] = []
    held = ends = 0
    for raw in raw_lines(path, longest=longest, begin=begin):
        custom_id, _, body = _parsed(raw, endpoint, longest)
        portion.append(Line(line + raw.number, custom_id, body))
        held += len(body)
        ends = raw.ends
        if len(portion) >= most or held >= size:
            yield portion, ends
            portion, held = [], 0
    if portion:
        yield portion, ends


def _parsed(raw: Raw, endpoint: str, longest: int) -> tuple[str, _Body, bytes]:
    if raw.data is None:
        message = (
            f"This line is longer than {longest} bytes, which no request may be. Raise --max-body-mib, or send less."
        )
        raise _Wrong("line_too_long", message)
    try:
        # As a text, because what the body says is passed over here, and would be found to be no UTF-8 too late.
        request = msgspec.json.decode(raw.data.decode(), type=_Request)
    except NOT_JSON as error:
        raise _Wrong(
            "invalid_json_line", f"This line is not a JSON object: {error}. Write each request in a line of its own."
        ) from None
    if not isinstance(request.custom_id, str) or not request.custom_id:
        raise _Wrong("missing_required_parameter", "This line needs a custom_id that is a text.", "custom_id")
    if request.method != "POST":
        raise _Wrong("invalid_method", "The method of a request must be POST.", "method")
    if request.url != endpoint:
        raise _Wrong("url_mismatch", f"The url of this line must be the endpoint of the batch, {endpoint}.", "url")
    try:
        body = msgspec.json.decode(request.body, type=_Body)
    except NOT_JSON as error:
        raise _Wrong(
            "missing_required_parameter", f"This line needs a body that is an object: {error}.", "body"
        ) from None
    if body.stream:
        message = "A request of a batch cannot stream: its answer is a line of a file. Leave stream out."
        raise _Wrong("unsupported_value", message, "body.stream")
    return request.custom_id, body, bytes(request.body)


def _model(body: _Body, serves: Callable[[str], bool]) -> str:
    if not isinstance(body.model, str) or not body.model:
        raise _Wrong("missing_required_parameter", "The body needs the name of a model.", "body.model")
    if not serves(body.model):
        raise _Wrong("model_not_found", f"The model {body.model[:64]!r} is not served here.", "body.model")
    return body.model
