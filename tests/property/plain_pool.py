"""The rules of `BlockPool` written down plainly: one list of blocks, looked through at every question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass
class Block:
    holders: int = 0
    key: bytes | None = None
    owner: str = ""
    level: int = 0
    freed: int = 0  # the time of its last release,
    turn: int = 0  # and its place among all that were freed


class PlainPool:
    """Told what is done to the real pool, and with which blocks, it knows what must be lost next, and why."""

    def __init__(self, blocks: int, quota: float, *, levels: int, credit: int, past: int) -> None:
        self.blocks = [Block() for _ in range(blocks)]
        self._most = int(quota * blocks)
        self._levels, self._credit, self._past_most = levels, credit, past
        self._now = self._turn = 0
        self._greedy: list[str] = []
        self._past: dict[bytes, int] = {}

    @property
    def content(self) -> dict[bytes, tuple[str, int]]:
        """Owner and level of all that is remembered."""
        return {block.key: (block.owner, block.level) for block in self.blocks if block.key is not None}

    def find(self, key: bytes) -> Block | None:
        return next((block for block in self.blocks if block.key == key), None)

    def share(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.blocks[number].holders += 1
            self.asked(self.blocks[number])

    def alloc(self, numbers: Sequence[int]) -> list[tuple[int, bytes, str]]:
        """These are handed out. Returns what is lost for that, in order: block, key and owner."""
        lost = []
        blank = sum(1 for block in self.blocks if not block.holders and block.key is None)
        for _ in range(len(numbers) - blank):
            victim = self._victim()
            assert victim.key is not None
            lost.append((self.blocks.index(victim), victim.key, victim.owner))
            self._past[victim.key] = victim.level
            if len(self._past) > self._past_most:
                del self._past[next(iter(self._past))]
            self._forget(victim)
            victim.holders = 1
        for number in numbers:
            self.blocks[number].holders = 1
        return lost

    def release(self, numbers: Sequence[int]) -> None:
        if numbers and self.blocks[numbers[0]].key is not None:
            self._now += 1
        for number in reversed(numbers):
            self.blocks[number].holders -= 1
            self._put(self.blocks[number])

    def publish(self, number: int, key: bytes, owner: str) -> bool:
        block, known = self.blocks[number], self.find(key)
        if block.key is not None:
            return False
        if known is not None:
            self.asked(known)
            return False
        block.key, block.owner = key, owner
        block.level = min(self._past.pop(key) + 1, self._levels - 1) if key in self._past else 0
        if owner and self._owned(owner) > self._most and owner not in self._greedy:
            self._greedy.append(owner)
        return True

    def forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._forget(self.blocks[number])

    def asked(self, block: Block) -> None:
        block.level = min(block.level + 1, self._levels - 1)
        self._put(block)

    def _put(self, block: Block) -> None:
        if not block.holders:
            self._turn += 1
            block.freed, block.turn = self._now, self._turn

    def _victim(self) -> Block:
        """The oldest of the first owner above his quota; else the first of a line, by time and credit."""
        free = sorted((b for b in self.blocks if not b.holders and b.key is not None), key=lambda b: b.turn)
        for owner in self._greedy:
            mine = [block for block in free if block.owner == owner]
            if mine:
                return mine[0]
        lines = [[block for block in free if block.level == level] for level in range(self._levels)]
        return min((line[0] for line in lines if line), key=lambda b: b.freed + b.level * self._credit)

    def _owned(self, owner: str) -> int:
        return sum(1 for block in self.blocks if block.key is not None and block.owner == owner)

    def _forget(self, block: Block) -> None:
        owner, block.key, block.owner, block.level = block.owner, None, "", 0
        if owner in self._greedy and self._owned(owner) <= self._most:
            self._greedy.remove(owner)
