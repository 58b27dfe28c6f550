"""Copies on queues of their own: whatever order a device takes, memory ends up as if each had waited its turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazystreams import LazyStreams
from ropeway.contract import BlockCopy
from ropeway.errors import EngineError
from ropeway.runtime import transfer
from ropeway.runtime.blockfile import BlockFile
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.streams import COMPUTE, DOWN
from ropeway.runtime.transfer import DEVICE, DISK, HOST, Moving, Underway

CPU = torch.device("cpu")
SHAPE = (2, 3)
BLOCKS = {DEVICE: 6, HOST: 4, DISK: 5}
BLOCK_BYTES = 2 * 6 * 4


@pytest.fixture(autouse=True, scope="module")
def little_room() -> Iterator[None]:
    """So little beside the cache that all of it is used again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "aside_blocks", lambda _: 3)
        yield


def disk(path: Path) -> BlockFile:
    found = BlockFile(path, bytes(32), BLOCK_BYTES, 64 * 1024)
    assert found.slots >= BLOCKS[DISK]
    return found


def store(path: Path, streams: LazyStreams | None) -> KVStore:
    return KVStore(
        BLOCKS[DEVICE], 2, SHAPE, torch.int32, CPU, host_blocks=BLOCKS[HOST], disk=disk(path), streams=streams
    )


class Pair:
    """The same plans for a store whose copies are queued, with up to `depth` steps under way, and for a plain one."""

    def __init__(self, path: Path, random: Random, depth: int) -> None:
        self.random, self.depth = random, depth
        self.streams = LazyStreams(random)
        self.queued, self.plain = store(path / "queued", self.streams), store(path / "plain", None)
        self.names: dict[int, bytes] = {}  # of what is on disk, by slot
        self.open: list[tuple[Moving, list[bytes], int]] = []
        self.written = 0

    def step(self) -> None:
        """A plan with some copies, whose rows read all blocks of the device and write to some."""
        if len(self.open) == self.depth:
            self.finish()
        copies = [self.copy() for _ in range(self.random.choice([0, 1, 2, 3, 9]))]
        _, lost = self.plain.begin(copies).finish()
        moving = self.queued.begin(copies)
        seen = torch.zeros_like(self.queued.data)
        self.streams.put(COMPUTE, lambda: seen.copy_(self.queued.data))
        expected = self.plain.data.clone()
        self.streams.put(COMPUTE, lambda: self.check(seen, expected))
        for block in self.random.sample(range(BLOCKS[DEVICE]), self.random.randrange(4)):
            self.written += 1
            self.plain.data[block] = self.written
            self.streams.put(COMPUTE, lambda block=block, value=self.written: self.queued.data[block].fill_(value))
        self.open.append((moving, lost, len(copies)))

    def check(self, seen: Tensor, expected: Tensor) -> None:
        assert torch.equal(seen[:-1], expected[:-1]), "a row has read something else"

    def copy(self) -> BlockCopy:
        source, target = self.random.choice(
            [(DEVICE, HOST), (DEVICE, HOST), (HOST, DEVICE), (HOST, DEVICE), (DEVICE, DISK), (DISK, DEVICE),
             (HOST, DISK), (DISK, HOST), (HOST, HOST), (DEVICE, DEVICE), (DEVICE, "")]
        )  # fmt: skip
        if not target:  # content is to be forgotten
            slot = self.random.randrange(BLOCKS[DISK])
            self.names.pop(slot, None)
            return BlockCopy(0, slot, DEVICE, DISK)
        if source == DISK and not self.names:
            source, target = HOST, DEVICE
        first, second = self.random.randrange(BLOCKS[source]), self.random.randrange(BLOCKS[target])
        key = b""
        if source == DISK:
            first = self.random.choice(sorted(self.names))
            key = self.names[first]
        elif target == DISK:
            key = self.names[second] = self.random.randbytes(16)
        return BlockCopy(first, second, source, target, key)

    def finish(self) -> None:
        moving, lost, count = self.open.pop(0)
        seconds, found = moving.finish()
        assert found == lost == []
        assert len(seconds) == count
        assert all(second >= 0 for second in seconds)

    def close(self) -> None:
        while self.open:
            self.finish()
        self.queued.close()
        self.plain.close()
        assert self.streams.closed
        assert torch.equal(self.queued.data[:-1], self.plain.data[:-1])


def contents(path: Path) -> dict[bytes, bytes]:
    """What a new process finds on disk."""
    file, found = disk(path), {}
    for slot, key in file.kept:
        into = bytearray(BLOCK_BYTES)
        assert file.read(slot, key, memoryview(into))
        found[key] = bytes(into)
    file.close()
    return found


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 30), depth=st.integers(1, 3))
def test_any_order_gives_what_one_after_the_other_gives(
    tmp_path_factory: pytest.TempPathFactory, seed: int, depth: int
) -> None:
    path = tmp_path_factory.mktemp("tiers")
    pair = Pair(path, Random(seed), depth)
    for _ in range(12):
        pair.step()
    pair.close()
    assert contents(path / "queued") == contents(path / "plain")


@pytest.mark.parametrize("forgotten", ["COMPUTE", "UP", "DOWN"])
def test_every_queue_has_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """The property above would notice if one of the waits were missing."""
    plain = LazyStreams.after

    def forget(self: LazyStreams, queue: str, mark: object) -> None:
        if queue != getattr(transfer, forgotten):
            plain(self, queue, mark)  # type: ignore[arg-type]

    monkeypatch.setattr(LazyStreams, "after", forget)
    wrong = 0
    for seed in range(20):
        pair = Pair(tmp_path / str(seed), Random(seed), 2)
        try:
            for _ in range(12):
                pair.step()
            pair.close()
        except AssertionError:
            wrong += 1
        finally:
            for kv in (pair.queued, pair.plain):
                if kv.disk is not None:  # closed already where all went well
                    kv.disk.close()
    assert wrong


def test_transfers_run_beside_the_model(tmp_path: Path) -> None:
    """What comes is on its way while the step before is computed; what leaves, while the step after is."""
    streams = LazyStreams(Random(0))
    kv = store(tmp_path, streams)
    kv.data[0] = 7
    kv.begin([BlockCopy(0, 0, DEVICE, HOST)]).finish()
    streams.frozen = {COMPUTE}
    coming = cast(Underway, kv.begin([BlockCopy(0, 2, HOST, DEVICE)]))
    assert coming.moves[0].ended is not None
    coming.moves[0].ended.wait()
    assert not kv.data[2].any(), "its place may still be read"
    streams.frozen = {DOWN}
    leaving = kv.begin([BlockCopy(2, 1, DEVICE, HOST)])
    streams.put(COMPUTE, lambda: kv.data.fill_(5))
    streams.mark(COMPUTE).wait()
    assert (kv.data == 5).all()
    streams.frozen = set()
    leaving.finish()
    kv.begin([BlockCopy(1, 3, HOST, DEVICE)]).finish()
    streams.mark(COMPUTE).wait()
    assert (kv.data[3] == 7).all(), "what left is what was there before"
    kv.close()


def test_damage_is_told_and_brings_nothing(tmp_path: Path) -> None:
    kv = store(tmp_path, LazyStreams(Random(1)))
    kv.data.fill_(3)
    kv.begin([BlockCopy(0, 0, DEVICE, DISK, b"a" * 16)]).finish()
    wrong, right = BlockCopy(0, 1, DISK, DEVICE, b"b" * 16), BlockCopy(0, 2, DISK, DEVICE, b"a" * 16)
    assert kv.begin([wrong, right]).finish()[1] == [b"b" * 16]
    kv.close()


def test_a_tier_that_is_not_there(tmp_path: Path) -> None:
    for kv in (KVStore(2, 1, SHAPE, torch.int32, CPU), store(tmp_path, LazyStreams(Random(0)))):
        kv.data.fill_(1)
        with pytest.raises(EngineError, match="from 'device' to 'tape'; this executor has the tiers device"):
            kv.begin([BlockCopy(0, 1), BlockCopy(0, 1, DEVICE, "tape")]).finish()
        kv.close()


def test_a_scratch_block_beyond_the_pool() -> None:
    kv = KVStore(3, 2, SHAPE, torch.float32, CPU)
    assert kv.scratch == 3
    assert kv.data.shape == (4, 2, *SHAPE)
    assert kv.bytes == 3 * 2 * 6 * 4
    assert not kv.data.any()
