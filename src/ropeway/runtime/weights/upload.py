"""Tensors of a checkpoint straight into a device's memory: threads read files into a few pinned buffers, from which the
device takes them, converting where types differ. No tensor is ever held in RAM as a whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ropeway.checkpoint import TensorInfo
from ropeway.errors import ModelError
from ropeway.runtime.streams import COMPUTE, UP, Mark, Streams

CHUNK = 4 << 20
"""Bytes that one thread reads at a time: so many that a transfer costs little more than its bytes, and so few that not
much is waited for at the end of a tensor."""
BUFFERS = 16
READERS = 4
"""One thread copies out of the system's file cache slower than a GPU takes it."""


@dataclass
class _Buffer:
    """Pinned bytes, which the device has read when `until` is passed."""

    memory: Tensor
    until: Mark | None = None


@dataclass(frozen=True)
class _Chunk:
    """Bytes that are being read into `buffer`, for the elements `target` on the device, stored as `dtype`."""

    reading: Future[None]
    buffer: _Buffer
    size: int
    dtype: torch.dtype
    target: Tensor


class Uploader:
    """Files are opened as they are needed and stay open until `close`. For one thread at a time."""

    def __init__(self, streams: Streams, *, chunk: int = CHUNK, buffers: int = BUFFERS, readers: int = READERS) -> None:
        """`chunk` is a multiple of 8, `buffers` at least 2."""
        self._streams, self._chunk = streams, chunk
        memory = streams.pinned(buffers * chunk, torch.uint8).view(buffers, chunk)
        self._idle = deque(_Buffer(part) for part in memory.unbind())
        self._at_once = buffers // 2  # while the device takes the others
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="weights")
        self._files: dict[Path, int] = {}

    def fill(self, parts: Sequence[tuple[TensorInfo, torch.dtype, Tensor]]) -> None:
        """Bring each tensor of the checkpoint, stored in that type, into the contiguous tensor on the device. Returns
        once everything is read; what is put into COMPUTE from now on finds it there. Raises ModelError if a file cannot
        be read."""
        self._streams.after(UP, self._streams.mark(COMPUTE))  # which may still use memory that now is a target's
        chunks: deque[_Chunk] = deque()
        try:
            for info, dtype, out in parts:
                flat, step = out.view(-1), self._chunk // dtype.itemsize
                for first in range(0, flat.shape[0], step):
                    if len(chunks) == self._at_once:
                        self._take(chunks.popleft())
                    chunks.append(self._read(info, dtype, flat[first : first + step], first))
            while chunks:
                self._take(chunks.popleft())
        except OSError as error:
            raise ModelError(
                f"The weights in {parts[0][0].file.parent} cannot be read: {error.strerror or error}. "
                "Check the disk, and that nothing changes the files."
            ) from error
        finally:
            wait([chunk.reading for chunk in chunks])  # after an error: nobody may read into a buffer any more
        self._streams.after(COMPUTE, self._streams.mark(UP))

    def close(self) -> None:
        """Give files and buffers back."""
        self._threads.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._idle.clear()
        self._streams.close()

    def _read(self, info: TensorInfo, dtype: torch.dtype, target: Tensor, first: int) -> _Chunk:
        buffer, size = self._idle.popleft(), target.shape[0] * dtype.itemsize
        file = self._files.get(info.file)
        if file is None:
            file = self._files[info.file] = os.open(info.file, os.O_RDONLY)
        reading = self._threads.submit(_fill, file, info.begin + first * dtype.itemsize, buffer, size)
        return _Chunk(reading, buffer, size, dtype, target)

    def _take(self, chunk: _Chunk) -> None:
        """Let the device take a chunk as soon as it is read."""
        chunk.reading.result()
        source, target = chunk.buffer.memory[: chunk.size].view(chunk.dtype), chunk.target
        if chunk.dtype == target.dtype:
            self._streams.put(UP, lambda: target.copy_(source, non_blocking=True))
        else:  # converted there: torch would convert first, here, and wait for it
            self._streams.put(UP, lambda: target.copy_(source.to(target.device, non_blocking=True)))
        chunk.buffer.until = self._streams.mark(UP)
        self._idle.append(chunk.buffer)


def _fill(file: int, begin: int, buffer: _Buffer, size: int) -> None:
    """Read `size` bytes of `file` from `begin` on, once the device has taken what was in `buffer`."""
    if buffer.until is not None:
        buffer.until.wait()
    left = buffer.memory.numpy().data[:size]
    while left:
        got = os.preadv(file, [left], begin)
        if not got:
            raise OSError("a file has become shorter")
        left, begin = left[got:], begin + got
