"""Copies of KV blocks between the device's memory and the tiers beneath it.

On a CPU all of it is one memory, and a plan's copies are made one after the other before its rows (`Direct`). On a GPU
they travel on queues of their own, beside the model's work (`Queued`). What leaves is first copied aside on the device,
between the steps before and the step that evicts it, and goes down from there. What comes is brought to the side first,
while steps before are still computed, and put in its place right before the step that wants it. So nothing that is
queued later can come too early for a copy, a block may be written as soon as the plan that evicts it has begun, and
neither rows nor block tables need to know of copies under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from ropeway.contract import BlockCopy
from ropeway.errors import EngineError
from ropeway.runtime.blockfile import BlockFile
from ropeway.runtime.memory import aside_blocks
from ropeway.runtime.streams import COMPUTE, DOWN, UP, Mark, Streams

DEVICE, HOST, DISK = "device", "host", "disk"


class Moving(Protocol):
    """A plan's copies, begun."""

    def finish(self) -> tuple[list[float], list[bytes]]:
        """Wait for them. What each took, in seconds, and the keys of those whose source was damaged."""


class Mover(Protocol):
    """Carries out copies of blocks between tiers, plan after plan."""

    def begin(self, copies: Sequence[BlockCopy]) -> Moving:
        """Start `copies`, in order. Whatever is computed from now on finds them done, and whatever was queued before
        still finds what was there. Raises EngineError, before any of them, for a tier that does not exist here."""

    def close(self) -> None:
        """Hand everything that is to outlive the process to the disk."""


@dataclass(frozen=True)
class Moved:
    """Copies that were done at once."""

    seconds: list[float]
    lost: list[bytes]

    def finish(self) -> tuple[list[float], list[bytes]]:
        return self.seconds, self.lost


class Direct:
    """`tensors` are the tiers in RAM by name, block by block along the first dimension."""

    def __init__(self, tensors: Mapping[str, Tensor], disk: BlockFile | None) -> None:
        self._tensors, self._disk = tensors, disk

    def begin(self, copies: Sequence[BlockCopy]) -> Moved:
        _check(copies, self._tensors, self._disk)
        seconds, lost = [], []
        _expect(copies, self._disk)
        for copy in copies:
            begun = time.perf_counter()
            if not self._copy(copy):
                lost.append(copy.key)
            seconds.append(time.perf_counter() - begun)
        return Moved(seconds, lost)

    def close(self) -> None:
        pass

    def _copy(self, copy: BlockCopy) -> bool:
        source, target = self._tensors.get(copy.source_tier), self._tensors.get(copy.target_tier)
        if source is not None and target is not None:
            target[copy.target].copy_(source[copy.source])
        elif source is not None and self._disk is not None:
            self._disk.write(copy.target, copy.key, _bytes(source[copy.source]).tobytes())
        elif target is not None and self._disk is not None:
            return self._disk.read(copy.source, copy.key, _bytes(target[copy.target]))
        return True


@dataclass
class _Buffer:
    """Room for a block, free again once `until` is passed."""

    memory: Tensor
    until: Mark | None = None


@dataclass
class _Move:
    """One copy under way: between two marks, and for `seconds` in this process."""

    key: bytes
    begun: Mark | None = None
    ended: Mark | None = None
    seconds: float = 0.0
    lost: bool = False

    def finish(self) -> float:
        if self.begun is None or self.ended is None:
            return self.seconds
        self.ended.wait()
        return self.seconds + self.ended.since(self.begun)


@dataclass(frozen=True)
class _Write:
    """A block for the disk, whose content is there once `move` has ended."""

    number: int
    slot: int
    content: Tensor | bytes
    move: _Move


class Queued:
    """`data` is the device's memory and `host`, pinned, that of the host tier, block by block.

    A host block is read and written in the order of the plans: whoever wants it next waits for `_busy` of it. Blocks on
    disk are written in that order too, as their content arrives; whoever reads one waits for its write.
    """

    def __init__(self, data: Tensor, host: Tensor | None, disk: BlockFile | None, streams: Streams) -> None:
        self._data, self._host, self._disk, self._streams = data, host, disk, streams
        count = aside_blocks(data[0].nbytes)
        aside = torch.empty((2 * count, *data.shape[1:]), dtype=data.dtype, device=data.device)
        fresh = streams.mark(COMPUTE)  # until then its memory may be that of something that was just freed
        self._leaving, self._coming = _ring(aside[:count], fresh), _ring(aside[count:], fresh)
        self._busy: dict[int, Mark] = {}
        self._writes: deque[_Write] = deque()
        self._written = self._numbered = 0
        self._routes: dict[tuple[str, str], Callable[[BlockCopy], _Move]] = {(DEVICE, DEVICE): self._within}
        if host is not None:
            self._routes |= {(DEVICE, HOST): self._to_host, (HOST, DEVICE): self._from_host}
            self._routes |= {(HOST, HOST): self._on_host}
        if disk is not None:
            pinned = streams.pinned(2 * count * data[0].numel(), data.dtype).view(2 * count, *data.shape[1:])
            self._landed, self._read = _ring(pinned[:count]), _ring(pinned[count:])
            self._nothing = bytes(disk.block_bytes)
            self._routes |= {(DEVICE, DISK): self._to_disk, (DISK, DEVICE): self._from_disk}
        if host is not None and disk is not None:
            self._routes |= {(HOST, DISK): self._host_to_disk, (DISK, HOST): self._disk_to_host}

    def begin(self, copies: Sequence[BlockCopy]) -> Underway:
        tensors = {DEVICE: self._data} if self._host is None else {DEVICE: self._data, HOST: self._host}
        _check(copies, tensors, self._disk)
        _expect(copies, self._disk)
        moves = [self._routes[copy.source_tier, copy.target_tier](copy) for copy in copies]
        return Underway(self, moves, self._numbered)

    def close(self) -> None:
        self.write_until(self._numbered)

    def write_until(self, number: int) -> None:
        """Hand the first `number` writes to the disk, once their content is there. Forgets marks that are passed."""
        while self._written < number:
            write = self._writes.popleft()
            if write.move.ended is not None:
                write.move.ended.wait()
            begun = time.perf_counter()
            content = write.content if isinstance(write.content, bytes) else _bytes(write.content).tobytes()
            assert self._disk is not None
            self._disk.write(write.slot, write.move.key, content)
            write.move.seconds += time.perf_counter() - begun
            self._written = write.number
        self._busy = {block: mark for block, mark in self._busy.items() if not mark.passed()}

    def _within(self, copy: BlockCopy) -> _Move:
        begun = self._streams.mark(COMPUTE)
        self._streams.put(COMPUTE, lambda: self._data[copy.target].copy_(self._data[copy.source]))
        return _Move(copy.key, begun, self._streams.mark(COMPUTE))

    def _to_host(self, copy: BlockCopy) -> _Move:
        assert self._host is not None
        move = self._down(copy, self._host[copy.target], self._busy.get(copy.target))
        assert move.ended is not None
        self._busy[copy.target] = move.ended
        return move

    def _from_host(self, copy: BlockCopy) -> _Move:
        assert self._host is not None
        move = self._up(copy, self._host[copy.source], self._busy.get(copy.source))
        assert move.ended is not None
        self._busy[copy.source] = move.ended
        return move

    def _on_host(self, copy: BlockCopy) -> _Move:
        assert self._host is not None
        source, target = self._settled(copy.source), self._settled(copy.target)
        begun = time.perf_counter()
        target.copy_(source)
        return _Move(copy.key, seconds=time.perf_counter() - begun)

    def _to_disk(self, copy: BlockCopy) -> _Move:
        if not copy.key:  # a slot is emptied: there is nothing to bring
            return self._write(copy, self._nothing, _Move(b""))
        buffer = next(self._landed)
        while any(write.content is buffer.memory for write in self._writes):
            self.write_until(self._written + 1)
        return self._write(copy, buffer.memory, self._down(copy, buffer.memory, None))

    def _from_disk(self, copy: BlockCopy) -> _Move:
        buffer = next(self._read)
        if buffer.until is not None:
            buffer.until.wait()
        read = self._fetch(copy, buffer.memory)
        if read.lost:
            return read
        move = self._up(copy, buffer.memory, None)
        move.seconds, buffer.until = read.seconds, move.ended
        return move

    def _host_to_disk(self, copy: BlockCopy) -> _Move:
        begun = time.perf_counter()
        content = _bytes(self._settled(copy.source)).tobytes()
        return self._write(copy, content, _Move(copy.key, seconds=time.perf_counter() - begun))

    def _disk_to_host(self, copy: BlockCopy) -> _Move:
        return self._fetch(copy, self._settled(copy.target))

    def _down(self, copy: BlockCopy, target: Tensor, after: Mark | None) -> _Move:
        """From the device to `target` in RAM, which is free after `after`."""
        streams, buffer = self._streams, next(self._leaving)
        aside = buffer.memory
        if buffer.until is not None:
            streams.after(COMPUTE, buffer.until)
        streams.put(COMPUTE, lambda: aside.copy_(self._data[copy.source]))
        streams.after(DOWN, streams.mark(COMPUTE))
        if after is not None:
            streams.after(DOWN, after)
        begun = streams.mark(DOWN)
        streams.put(DOWN, lambda: target.copy_(aside, non_blocking=True))
        buffer.until = ended = streams.mark(DOWN)
        return _Move(copy.key, begun, ended)

    def _up(self, copy: BlockCopy, source: Tensor, after: Mark | None) -> _Move:
        """From `source` in RAM, where the content is after `after`, to the device."""
        streams, buffer = self._streams, next(self._coming)
        aside = buffer.memory
        for mark in (buffer.until, after):
            if mark is not None:
                streams.after(UP, mark)
        begun = streams.mark(UP)
        streams.put(UP, lambda: aside.copy_(source, non_blocking=True))
        ended = streams.mark(UP)
        streams.after(COMPUTE, ended)
        streams.put(COMPUTE, lambda: self._data[copy.target].copy_(aside))
        buffer.until = streams.mark(COMPUTE)
        return _Move(copy.key, begun, ended)

    def _write(self, copy: BlockCopy, content: Tensor | bytes, move: _Move) -> _Move:
        self._numbered += 1
        self._writes.append(_Write(self._numbered, copy.target, content, move))
        return move

    def _fetch(self, copy: BlockCopy, into: Tensor) -> _Move:
        """Read a block from disk, after whatever is still to be written there."""
        assert self._disk is not None
        self.write_until(max((write.number for write in self._writes if write.slot == copy.source), default=0))
        begun = time.perf_counter()
        sound = self._disk.read(copy.source, copy.key, _bytes(into))
        return _Move(copy.key, seconds=time.perf_counter() - begun, lost=not sound)

    def _settled(self, block: int) -> Tensor:
        """A host block that no queue reads or writes any more."""
        assert self._host is not None
        if block in self._busy:
            self._busy.pop(block).wait()
        return self._host[block]


@dataclass(frozen=True)
class Underway:
    """A plan's copies on their queues; `last` is the number of the last write to disk that was asked for by then."""

    mover: Queued
    moves: list[_Move]
    last: int

    def finish(self) -> tuple[list[float], list[bytes]]:
        self.mover.write_until(self.last)
        return [move.finish() for move in self.moves], [move.key for move in self.moves if move.lost]


def _ring(buffers: Tensor, until: Mark | None = None) -> Iterator[_Buffer]:
    return cycle([_Buffer(buffer, until) for buffer in buffers.unbind()])


def _check(copies: Sequence[BlockCopy], tensors: Mapping[str, Tensor], disk: BlockFile | None) -> None:
    tiers = [*tensors, *([DISK] if disk is not None else [])]
    for copy in copies:
        if not {copy.source_tier, copy.target_tier} <= {*tiers} or copy.source_tier == copy.target_tier == DISK:
            raise EngineError(
                f"A plan copies a block from {copy.source_tier!r} to {copy.target_tier!r}; "
                f"this executor has the tiers {', '.join(tiers)}."
            )


def _expect(copies: Sequence[BlockCopy], disk: BlockFile | None) -> None:
    """Let the system fetch blocks from disk together."""
    if disk is not None:
        for copy in copies:
            if copy.source_tier == DISK:
                disk.expect(copy.source)


def _bytes(block: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return block.reshape(-1).view(torch.uint8).numpy().data
