"""What always holds in the books of scheduler and KV memory, whatever has been asked of them. Linear in everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ropeway.kv import BlockPool
from ropeway.scheduler import Scheduler
from ropeway.scheduler.sequence import State


def check(scheduler: Scheduler) -> None:
    """Raise AssertionError unless each block, slot and request is in exactly one place."""
    memory = scheduler.memory
    pinned = [block for block in memory.pins.held.values() if block is not None]
    check_pool(memory.pool, [*[seq.blocks for seq in scheduler.running], pinned])
    for shelf in memory.lower:
        check_pool(shelf.pool, [])
    running, waiting, size = scheduler.running, list(scheduler.waiting), scheduler.resources.block_size
    slots, free = [seq.slot for seq in running], scheduler._limits.slots.free
    if sorted(slots + free) != list(range(scheduler.resources.slots)):
        raise AssertionError(f"slots are lost or doubled: running {slots}, free {free}")
    if sorted([seq.rid for seq in (*running, *waiting)]) != sorted(scheduler.sequences):
        raise AssertionError("a sequence is neither running nor waiting, or twice there")
    for seq in running:
        if seq.state is not State.RUNNING or len(seq.blocks) * size < seq.computed:
            raise AssertionError(f"running request {seq.rid} is {seq.state} with {len(seq.blocks)} blocks")
    for seq in waiting:
        holds = seq.blocks or seq.computed or seq.known > len(seq.tokens) or seq.slot != -1
        if holds or seq.state is not State.QUEUED:
            raise AssertionError(f"waiting request {seq.rid} holds something")


def check_pool(pool: BlockPool, tables: Iterable[Sequence[int]] | None = None) -> None:
    """Raise AssertionError unless all invariants hold; `tables` are the block tables of all holders, if known."""
    kept = [block for line in pool._lines for block in line]
    free = {*kept, *pool._blank}
    if len(free) != len(kept) + len(pool._blank) or len(free) != pool.available:
        raise AssertionError(f"{len(free)} different blocks are free but {pool.available} are counted")
    if free != {b for b in range(pool.num_blocks) if pool.holders[b] == 0}:
        raise AssertionError("a block is both held and free, or neither")
    if any(pool.names[b] is None for b in kept) or any(pool.names[b] is not None for b in pool._blank):
        raise AssertionError("a block without a key is in a line, or one with a key is not")
    if {key: b for b, key in enumerate(pool.names) if key is not None} != pool._by_key:
        raise AssertionError("the index of keys disagrees with the blocks")
    for level, line in enumerate(pool._lines):
        if list(line.values()) != sorted(line.values()) or any(pool._level[b] != level for b in line):
            raise AssertionError(f"line {level} is not in order of release, or holds a block of another level")
    owned: dict[str, int] = {}
    for b in pool._by_key.values():
        owned[pool._owner[b]] = owned.get(pool._owner[b], 0) + 1
    if owned != pool._owned or {o for o, n in owned.items() if o and n > pool._quota} != set(pool._greedy):
        raise AssertionError("the numbers of blocks that owners have are wrong")
    if pool._rationed and sorted(b for line in pool._free_of.values() for b in line) != sorted(kept):
        raise AssertionError("the lines of owners disagree with those of levels")
    if tables is not None:
        counted = [0] * pool.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise AssertionError(f"a block table names a block twice: {list(table)}")
            for b in table:
                counted[b] += 1
        if counted != pool.holders:
            raise AssertionError("the numbers of holders disagree with the block tables")
