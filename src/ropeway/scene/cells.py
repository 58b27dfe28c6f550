"""The memory of an engine as a map that has a bounded number of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ropeway.contract.scene import MOST_CELLS

if TYPE_CHECKING:
    from ropeway.kv import Memory

FREE: Final = 0
PRIVATE: Final = 1
SHARED: Final = 2
CACHED: Final = 3
PINNED: Final = 4


def cells(memory: Memory, most: int = MOST_CELLS) -> bytes:
    """A byte for each of the device's blocks, or for every n-th where they are more than `most`: blocks are handed out
    one after the other, so those between are much the same, and the map costs no more than its cells."""
    pool, pinned = memory.pool, memory.pins.held
    holders, names = pool.holders, pool.names
    stride = -(-pool.num_blocks // most)
    return bytes(
        [
            PINNED
            if names[block] in pinned
            else min(holders[block], SHARED) or (FREE if names[block] is None else CACHED)
            for block in range(0, pool.num_blocks, stride)
        ]
    )
