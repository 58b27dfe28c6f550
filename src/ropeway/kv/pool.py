"""The pool of KV blocks: match, share, alloc, release, publish, keep and forget.

A block is free (nobody holds it), private (one holder) or shared (several). A free block may still carry a key: its
content is remembered and can be matched until the block is handed out again. Free blocks without a key are handed out
first, then remembered ones, least valuable first. Every verb is O(1) for each block.

What a remembered block is worth: when it was last released, and a credit for each time that its content was asked for
again. Blocks of equal credit form a line in order of release, so the least valuable one is at the head of one of a few
lines. The names of content that was lost last are kept with its credit, in case that it comes again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

LEVELS = 5
CREDIT = 500  # releases, most of them of whole requests, that having been asked for once more outweighs
PAST = 1 << 14  # names of lost content that are kept


class Age:
    """What pools tell time by: releases of remembered content, counted by all pools that share it."""

    def __init__(self) -> None:
        self.now = 0


class BlockPool:
    """`num_blocks` blocks, named 0 to num_blocks - 1. `remember` False turns the prefix cache off.

    An owner (but "") whose remembered blocks are more than the share `quota` of the pool loses his own first.
    `evicting` hears of the block, key and owner of a remembered block that is about to be handed out again. `kept` are
    blocks that are remembered from the start, with their keys, least recently used first.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        remember: bool = True,
        quota: float = 1.0,
        evicting: Callable[[int, bytes, str], None] | None = None,
        kept: Iterable[tuple[int, bytes]] = (),
        age: Age | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.remember = remember
        self.available = num_blocks
        self._quota = int(quota * num_blocks)
        self._rationed = quota < 1
        self._evicting = evicting
        self.holders = [0] * num_blocks  # of each block, for others to read too
        self.names: list[bytes | None] = [None] * num_blocks  # and what is in it
        self._by_key: dict[bytes, int] = {}
        self._past: OrderedDict[bytes, int] = OrderedDict()  # names of lost content, and its level
        self._blank = list(range(num_blocks - 1, -1, -1))  # free and without a key, the next last
        self._level = [0] * num_blocks
        # Free and remembered blocks, each with the time of its release.
        self._lines: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(LEVELS)]
        self._age = age or Age()
        self._owner = [""] * num_blocks
        self._owned: dict[str, int] = {}
        self._free_of: dict[str, OrderedDict[int, None]] = {}
        self._greedy: OrderedDict[str, None] = OrderedDict()  # owners above their quota
        for block, key in kept:
            self._name(block, key, "")
            self._put(block)
        self._blank = [block for block in self._blank if self.names[block] is None]

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.available

    @property
    def remembered(self) -> int:
        """Blocks, held or free, that can be matched."""
        return len(self._by_key)

    def find(self, key: bytes) -> int | None:
        """The block with the content named `key`, if it is remembered."""
        return self._by_key.get(key)

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
        return sum(1 for block in blocks if self.holders[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of each of these (matched) blocks."""
        for block in blocks:
            if self.holders[block] == 0:
                self._take(block)
                self.available -= 1
            self.holders[block] += 1
            self.refresh(block)

    def alloc(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, forgetting remembered content where needed; None if there are too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self.holders[block] = 1
            taken.append(block)
        self.available -= count
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding `blocks`, a sequence's block table in order.

        The last is freed first, so that a chain of remembered blocks loses its leaves before its root.
        """
        self._age.now += bool(blocks) and self.names[blocks[0]] is not None
        for block in reversed(blocks):
            if self.holders[block] <= 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self._put(block)
                self.available += 1

    def publish(self, block: int, key: bytes, owner: str = "") -> bool:
        """Remember that held `block` has the content named `key`, if no other block has. False if it is not news."""
        if self.holders[block] <= 0:
            raise ValueError(f"block {block} is published but nobody holds it")
        if not self.remember or self.names[block] is not None:
            return False
        known = self._by_key.get(key)
        if known is not None:
            self.refresh(known)
            return False
        self._name(block, key, owner)
        self._level[block] = min(self._past.pop(key, -1) + 1, LEVELS - 1)
        return True

    def keep(self, key: bytes, owner: str) -> int | None:
        """A block that remembers content named `key`, which is not here yet, and that nobody holds; None if all are
        held."""
        taken = self.alloc(1)
        if taken is None:
            return None
        self.publish(taken[0], key, owner)
        self.holders[taken[0]] = 0
        self._put(taken[0])
        self.available += 1
        return taken[0]

    def refresh(self, block: int) -> None:
        """The content of a remembered block was asked for."""
        free = self.holders[block] == 0
        if free:
            self._take(block)
        self._level[block] = min(self._level[block] + 1, LEVELS - 1)
        if free:
            self._put(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let the content of these blocks, held or free, be matched no more."""
        for block in blocks:
            free = self.holders[block] == 0 and self.names[block] is not None
            if free:
                self._take(block)
            self._forget(block)
            if free:
                self._put(block)

    def _evict(self) -> int:
        """The least valuable remembered block, nameless and in nobody's line."""
        block = self._least()
        key = self.names[block]
        if key is not None:
            if self._evicting is not None:
                self._evicting(block, key, self._owner[block])
            self._past[key] = self._level[block]
            if len(self._past) > PAST:
                self._past.popitem(last=False)
        self._take(block)
        self._forget(block)
        return block

    def _least(self) -> int:
        for owner in self._greedy:  # never more than 1 / quota
            if owner in self._free_of:
                return next(iter(self._free_of[owner]))
        least, worth = -1, 0
        for level, line in enumerate(self._lines):
            if line:
                block = next(iter(line))
                if least < 0 or line[block] + level * CREDIT < worth:
                    least, worth = block, line[block] + level * CREDIT
        return least

    def _name(self, block: int, key: bytes, owner: str) -> None:
        self.names[block], self._owner[block] = key, owner
        self._by_key[key] = block
        self._owned[owner] = self._owned.get(owner, 0) + 1
        if owner and self._owned[owner] > self._quota:
            self._greedy[owner] = None

    def _forget(self, block: int) -> None:
        key, owner = self.names[block], self._owner[block]
        if key is None:
            return
        del self._by_key[key]
        self.names[block] = None
        self._owned[owner] -= 1
        if self._owned[owner] <= self._quota:
            self._greedy.pop(owner, None)
        if not self._owned[owner]:
            del self._owned[owner]

    def _take(self, block: int) -> None:
        """Out of the free and remembered ones."""
        del self._lines[self._level[block]][block]
        if self._rationed:
            mine = self._free_of[self._owner[block]]
            del mine[block]
            if not mine:
                del self._free_of[self._owner[block]]

    def _put(self, block: int) -> None:
        """Into the free ones, as the last of its line."""
        if self.names[block] is None:
            self._blank.append(block)
            return
        self._lines[self._level[block]][block] = self._age.now
        if self._rationed:
            self._free_of.setdefault(self._owner[block], OrderedDict())[block] = None
