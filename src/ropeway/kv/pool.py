"""The pool of KV blocks: match, share, alloc, release, publish, forget, and a check.

A block is free (nobody holds it), private (one holder) or shared (several). A free block may still carry a key: its
content is remembered and can be matched until the block is handed out again. Free blocks form one doubly linked list
threaded through two integer lists. Blocks without a key are taken from the front first, then remembered ones in
least-recently-released order. Every verb is O(1) for each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks, named 0 to num_blocks - 1. `remember` False turns the prefix cache off."""

    def __init__(self, num_blocks: int, *, remember: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.remember = remember
        self._holders = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        # The free list: `end` is a sentinel that is both before the first and after the last block.
        self._end = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self.available = num_blocks

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.available

    @property
    def remembered(self) -> int:
        """Blocks, held or free, that can be matched."""
        return len(self._by_key)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of `keys`, from the first on, that are remembered. Changes nothing."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them takes that many from `available`."""
        return sum(1 for block in blocks if self._holders[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of each of these (matched) blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                self._unlink(block)
                self.available -= 1
            self._holders[block] += 1

    def alloc(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, forgetting remembered content where needed; None if there are too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            block = self._next[self._end]
            self._unlink(block)
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        self.available -= count
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding `blocks`, a sequence's block table in order.

        The last is freed first, so that a chain of remembered blocks loses its leaves before its root.
        """
        for block in reversed(blocks):
            if self._holders[block] <= 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._link(block, first=self._key[block] is None)
                self.available += 1

    def publish(self, block: int, key: bytes) -> None:
        """Remember that held `block` has the content named `key`. The first block published under a key keeps it."""
        if self._holders[block] <= 0:
            raise ValueError(f"block {block} is published but nobody holds it")
        if not self.remember or self._key[block] is not None or key in self._by_key:
            return
        self._key[block] = key
        self._by_key[key] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Let the content of these blocks, held or free, be matched no more."""
        for block in blocks:
            self._forget(block)

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError unless all invariants hold; `tables` are the block tables of all holders, if known."""
        free = []
        block = self._next[self._end]
        while block != self._end:
            if self._prev[self._next[block]] != block:
                raise AssertionError(f"the free list is broken at block {block}")
            free.append(block)
            if len(free) > self.num_blocks:
                raise AssertionError("the free list has a loop")
            block = self._next[block]
        if len(free) != self.available or len(set(free)) != len(free):
            raise AssertionError(f"{len(free)} blocks are in the free list but {self.available} are counted")
        held = {b for b in range(self.num_blocks) if self._holders[b] > 0}
        if held & set(free) or len(held) + len(free) != self.num_blocks:
            raise AssertionError("a block is both held and free, or neither")
        if {key: b for b, key in enumerate(self._key) if key is not None} != self._by_key:
            raise AssertionError("the index of keys disagrees with the blocks")
        if tables is not None:
            counted = [0] * self.num_blocks
            for table in tables:
                if len(set(table)) != len(table):
                    raise AssertionError(f"a block table names a block twice: {list(table)}")
                for b in table:
                    counted[b] += 1
            if counted != self._holders:
                raise AssertionError("the numbers of holders disagree with the block tables")

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._by_key[key]
            self._key[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before

    def _link(self, block: int, *, first: bool) -> None:
        before = self._end if first else self._prev[self._end]
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
