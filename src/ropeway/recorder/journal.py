"""The flight recorder's files: what an engine was told and what it decided, in order.

A file is `MAGIC` and then frames: length and CRC-32 of what follows (4 bytes each, big-endian), then msgpack. The
first frame is a `Header` with the whole state of the engine at that moment, so that each file can be replayed alone;
every other frame is a list of `Item`.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ropeway.contract.event import FinishReason
from ropeway.contract.message import Command, Report, Step
from ropeway.contract.plan import StepPlan
from ropeway.contract.request import SamplingParams
from ropeway.contract.result import ExecutorInfo, StepResult
from ropeway.errors import ConfigError

MAGIC = b"ropeway journal 1\n"
SUFFIX = ".journal"
WORLD = "clock and executor"
"""What stands in `Header.state` for the world outside the engine."""

_FRAME = struct.Struct(">II")


class Header(Struct, frozen=True, kw_only=True):
    """Whose record this is. `life` names one run of an engine, `part` counts its files from 1. `started` is wall-clock
    time (seconds since 1970) when the file began, `clock` the engine's own. `state` is for `snapshot.thaw`."""

    version: str
    life: str
    part: int
    started: float
    clock: float
    config: dict[str, Any]
    info: ExecutorInfo
    state: list[list[Any]]


class Planned(Struct, frozen=True, array_like=True, tag="plan"):
    """The executor was given a plan (see `slim`). Written before it is carried out."""

    plan: StepPlan
    moments: list[float]


class Called(Struct, frozen=True, array_like=True, tag="call"):
    """A call of the engine is over: `submit`, or `step` where `commands` is None. `moments` are what the clock said and
    `results` what the executor answered since the item before, `ended` the requests whose final event it returned.
    `error` is what it raised, if it did."""

    commands: list[Command] | None
    moments: list[float]
    results: list[StepResult]
    ended: list[tuple[int, FinishReason]]
    error: str = ""


class Closed(Struct, frozen=True, array_like=True, tag="close"):
    """The engine was closed in an orderly way."""


Item = Planned | Called | Closed


class Cut(Struct, frozen=True):
    """Never written: what a reader finds in the place of the last `bytes` of a file if they are no whole frame, as
    where a process was killed while it wrote."""

    bytes: int


_encoder = msgspec.msgpack.Encoder()
_items = msgspec.msgpack.Decoder(list[Item])
_header = msgspec.msgpack.Decoder(Header)


class Writer:
    """A new file. Raises OSError. What `write` has taken outlives this process even if it is killed."""

    def __init__(self, path: Path, header: Header) -> None:
        # Prompts and answers are in it: for the owner's eyes only.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.size = 0
        self._put(MAGIC)
        self.write(header)

    def write(self, content: Header | list[Item]) -> None:
        body = _encoder.encode(content)
        self._put(_FRAME.pack(len(body), zlib.crc32(body)) + body)

    def close(self) -> None:
        os.close(self._file)

    def _put(self, data: bytes) -> None:
        if os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(data)


def slim(plan: StepPlan) -> StepPlan:
    """`plan` without what is in the record already: tokens and parameters of those admitted."""
    if not plan.admit:
        return plan
    bare = SamplingParams()
    return replace(plan, admit=[replace(admit, tokens=[], sampling=bare, eos_ids=()) for admit in plan.admit])


def ended(reports: Iterable[Report]) -> list[tuple[int, FinishReason]]:
    """The requests whose final event is in `reports`."""
    found = []
    for report in reports:
        if isinstance(report, Step):
            found += [(event.rid, event.finish) for event in report.events if event.finish is not None]
    return found


def files(path: Path) -> list[Path]:
    """The journal files at `path`, a file or a directory, oldest first. Raises ConfigError if there are none."""
    found = [path] if path.is_file() else numbered(path)
    if not found:
        raise ConfigError(f"There is no journal at {path}. Give a directory that --journal wrote, or one of its files.")
    return found


def numbered(directory: Path) -> list[Path]:
    """The journal files in a directory, oldest first."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def read(path: Path) -> tuple[Header, Iterator[Item | Cut]]:
    """The header of a file and, lazily, what follows. Raises ConfigError if there is no journal in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The journal {path} cannot be read: {error.strerror}. Check the path.") from None
    frames = _frames(data)
    try:
        first = next(frames)
        header = _header.decode(first) if isinstance(first, bytes) else None
    except (StopIteration, msgspec.MsgspecError):
        header = None
    if not data.startswith(MAGIC):
        raise ConfigError(
            f"{path} does not begin like a journal of this version ({MAGIC.decode().strip()}). Replay it with the "
            "version that wrote it, or give another file."
        )
    if header is None:
        raise ConfigError(f"{path} ends before its state is complete, so it cannot be replayed. Give another file.")
    return header, _decode(frames)


def _decode(frames: Iterator[bytes | Cut]) -> Iterator[Item | Cut]:
    for frame in frames:
        if isinstance(frame, Cut):
            yield frame
        else:
            yield from _items.decode(frame)


def _frames(data: bytes) -> Iterator[bytes | Cut]:
    at = len(MAGIC)
    while at < len(data):
        if len(data) - at < _FRAME.size:
            break
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(body) < length or zlib.crc32(body) != crc:
            break
        yield body
        at += _FRAME.size + length
    if at < len(data):
        yield Cut(len(data) - at)
