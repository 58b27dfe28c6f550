"""The command around `run-batch`: a file of requests in, a file of answers out.

Answers are appended to a file beside the output as they come, each with the number of its line; that file is what an
interrupted run continues from. When all are there it is written in the order of the input, and the output appears.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Raw, Struct

from ropeway.api.inside import Inside
from ropeway.cli.offline import offline
from ropeway.cli.progress import counting
from ropeway.config import EngineConfig, ServerConfig
from ropeway.contract import Urgency
from ropeway.errors import ConfigError, EngineError
from ropeway.jobs.records import ItemError, OutputLine, OutputResponse, derived_id
from ropeway.jobs.work import NOT_JSON, Call, Caller, Reply
from ropeway.observe.logs import configure

_AGAIN: Final = (429, 500, 503)
_ATTEMPTS: Final = 6
_TELL_SECONDS: Final = 10.0
_ENDED: Final = "The engine has ended before the last answer. Its log says why; the same command goes on from there."
_MARK: Final = b"ropeway run-batch 1 "


class InputLine(Struct, frozen=True):
    """A request as OpenAI's batches have it."""

    custom_id: str
    method: str
    url: str
    body: Raw


class Partial:
    """The answers so far, by the number of their line, in a file that lasts. `name` says which input and which model
    they belong to. Raises ConfigError if the file belongs to another."""

    def __init__(self, path: Path, name: str, *, restart: bool = False) -> None:
        self.path = path
        self._places: dict[int, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if restart:
            path.unlink(missing_ok=True)
        self._file: BinaryIO = path.open("a+b")
        self._file.seek(0)
        mark = _MARK + name.encode() + b"\n"
        first = self._file.readline()
        if first.endswith(b"\n") and first != mark:
            self._file.close()
            raise ConfigError(
                f"{path} has answers to another file, or of another model. Finish that run, or give --restart to "
                "forget them.",
                param="input_file",
            )
        end = self._read_places(len(mark)) if first == mark else 0
        self._file.truncate(end)  # a last line that was cut by the end of the run
        if not end:
            self._file.write(mark)
            self._file.flush()

    def _read_places(self, end: int) -> int:
        for line in self._file:
            number, _, rest = line.partition(b" ")
            if not (line.endswith(b"\n") and number.isdigit()):
                break
            self._places[int(number)] = (end + len(number) + 1, len(rest))
            end += len(line)
        return end

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, line: bytes) -> None:
        """Keep the answer to line `number`. It outlives this process from now on."""
        head = b"%d " % number
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(head + line + b"\n")
        self._file.flush()
        self._places[number] = (start + len(head), len(line) + 1)

    def finish(self, output: Path) -> None:
        """Write all answers to `output` in the order of their lines, and drop this file."""
        made = self.path.with_suffix(".ordered")
        with made.open("wb") as ordered:
            for number in sorted(self._places):
                offset, length = self._places[number]
                self._file.seek(offset)
                ordered.write(self._file.read(length))
            ordered.flush()
            os.fsync(ordered.fileno())
        _move(made, output)
        self.close()
        self.path.unlink()

    def close(self) -> None:
        with suppress(OSError):  # a full disk refuses for a second time what it has refused before
            self._file.close()


class Progress:
    """Says how far a run is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._done, self._begin = total, done, done
        self.failed = 0
        self._clock = clock
        self._begun = self._told = clock()
        self._stack = ExitStack()

    def __enter__(self) -> Progress:
        self._bar = self._stack.enter_context(counting("requests", self._total))
        for _ in range(self._done):
            self._bar()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def rate(self) -> float:
        """Requests a second."""
        return (self._done - self._begin) / max(self._clock() - self._begun, 1e-9)

    def one(self, *, failed: bool) -> None:
        self._done += 1
        self.failed += failed
        self._bar()
        if not sys.stderr.isatty() and self._clock() - self._told >= _TELL_SECONDS:
            self._told = self._clock()
            left = (self._total - self._done) / max(self.rate, 1e-9)
            print(f"{self}, {self.rate:.1f}/s, about {left:.0f} s left", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"{self._done} of {self._total} done, {self.failed} failed"


def run(
    engine: EngineConfig,
    server: ServerConfig,
    *,
    source: Path,
    output: Path,
    folder: Path | None,
    inflight: int | None,
    restart: bool,
) -> None:
    """Answer `source` into `output`. Raises RopewayError if it cannot be done; a request that fails has its error in
    the output instead."""
    configure(server.log_level, server.log_format)
    try:
        name, total = _look_at(source, engine.model)
        if output.is_dir():
            raise ConfigError(f"{output} is a directory; name a file.", param="output_file")
        partial = Partial((folder or output.parent) / f"{output.name}.partial", name, restart=restart)
    except OSError as error:
        raise ConfigError(f"{error.filename or output} cannot be used: {error.strerror}. Check the paths.") from None
    if partial:
        print(f"going on after {len(partial)} of {total} requests", file=sys.stderr)
    try:
        with Progress(total, len(partial)) as progress:
            asyncio.run(_run(engine, server, source, partial, inflight, progress))
        partial.finish(output)
    except KeyboardInterrupt:
        print(f"interrupted: {progress}. The same command goes on from there.", file=sys.stderr)
        raise
    except OSError as error:
        where = error.filename2 or error.filename or partial.path  # writing names no file, copying two
        raise ConfigError(
            f"{where} cannot be written: {error.strerror}. Make room; the same command goes on from there."
        ) from None
    finally:
        partial.close()
    print(f"{progress}, {progress.rate:.1f}/s. Written to {output}", file=sys.stderr)


async def _run(
    engine: EngineConfig,
    server: ServerConfig,
    source: Path,
    partial: Partial,
    inflight: int | None,
    progress: Progress,
) -> None:
    async with offline(engine, server) as found:
        inside, accounts = Inside(found.app), found.app.state.accounts

        async def counted(call: Call) -> Reply:
            reply = await inside(call)
            if reply.used is not None:
                accounts.count(reply.used)
            return reply

        answering = asyncio.ensure_future(
            answer_all(counted, source, partial, inflight or max(2 * found.seats, 1), progress)
        )
        try:
            watched: list[asyncio.Future[Any]] = [answering, found.gone]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise found.gone.result() or EngineError(_ENDED)
            await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await accounts.close()


async def answer_all(caller: Caller, source: Path, partial: Partial, inflight: int, progress: Progress) -> None:
    """Answer those lines of `source` that `partial` does not have, `inflight` at a time."""
    with source.open("rb") as lines:
        waiting = ((number, line) for number, line in _numbered(lines) if number not in partial)

        async def work() -> None:
            for number, line in waiting:
                made = await answer(caller, line, derived_id("batch_req_", partial.path.name, number))
                partial.add(number, msgspec.json.encode(made))
                progress.one(failed=made.response is None or made.response.status_code >= 400)

        tasks = [asyncio.ensure_future(work()) for _ in range(inflight)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def answer(caller: Caller, line: bytes, name: str) -> OutputLine:
    """What the output says to a line of the input."""
    try:
        asked = msgspec.json.decode(line, type=InputLine)
    except NOT_JSON as error:
        return OutputLine(name, None, None, ItemError("invalid_json_line", f"This line is no request: {error}."))
    if asked.method != "POST":
        message = f"method is {asked.method[:32]!r}; it must be 'POST'."
        return OutputLine(name, asked.custom_id, None, ItemError("invalid_method", message))
    reply = await _reply(caller, Call(url=asked.url, body=bytes(asked.body), urgency=Urgency.HIGH, request_id=name))
    response = OutputResponse(reply.status, reply.request_id, Raw(reply.body))
    return OutputLine(name, asked.custom_id, response, None)


async def _reply(caller: Caller, call: Call) -> Reply:
    """The answer, asked for again while the engine is busy or comes back."""
    for attempt in range(1, _ATTEMPTS + 1):
        reply = await caller(call)
        if reply.status not in _AGAIN or attempt == _ATTEMPTS:
            return reply
        await asyncio.sleep(reply.retry_after or min(2.0**attempt, 30.0))
    raise AssertionError("the last attempt returns")


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The requests of a file with the numbers of their lines; empty lines are none."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _look_at(source: Path, model: str) -> tuple[str, int]:
    """What names a file of requests and the model that answers it, and how many there are."""
    digest, total = hashlib.sha256(model.encode() + b"\0"), 0
    with source.open("rb") as lines:
        for _, line in _numbered(lines):
            digest.update(line)
            total += 1
    if not total:
        raise ConfigError(f"{source} has no requests. Give one as JSON in each line.", param="input_file")
    return digest.hexdigest(), total


def _move(made: Path, output: Path) -> None:
    """Rename, also from another file system: then by way of a copy beside the output."""
    try:
        made.replace(output)
    except OSError:
        import shutil

        beside = output.with_name(output.name + ".copying")
        shutil.copyfile(made, beside)
        beside.replace(output)
        made.unlink()
