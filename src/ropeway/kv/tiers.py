"""Memory beneath the device's: who holds which block there, and the copies that the next plan carries out.

All tiers name content alike, so swapping out, offloading and caching are one thing. A remembered block that the device
is about to hand out again goes to the tier beneath, whose own least valuable block goes one further down; content that
a sequence may start from is looked for in all tiers and brought back. A lasting tier also gets every block as soon as
it is published. Plans run in order and a plan's copies run in order before its rows, so all of this can be decided
while a plan is made, and a block can be handed out while its content is still to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ropeway.contract import BlockCopy, StepPlan, StepResult, Tier, TierStats
from ropeway.kv.pins import Pins
from ropeway.kv.pool import Age, BlockPool

PreemptionMode = Literal["auto", "swap", "recompute"]

DEVICE = "device"
_KEEP = 0.9  # what a mean of times keeps of itself when another is taken in
_FADE = 0.999  # what the time of a copy becomes with each step, so that a tier that seemed slow is tried again


class Shelf:
    """One tier: which content its blocks have, and what a copy to it and from it takes (seconds; 0: not known yet)."""

    def __init__(self, tier: Tier, below: Shelf | None, memory: Memory) -> None:
        self.name, self.lasting, self.below = tier.name, tier.lasting, below
        self.pool = BlockPool(
            tier.blocks, remember=memory.remember, quota=memory.quota, evicting=self.hand_down, kept=tier.kept,
            age=memory.age,
        )  # fmt: skip
        self.hits = 0
        self.write = self.read = 0.0
        self._memory = memory

    def hand_down(self, block: int, key: bytes, owner: str) -> None:
        if self.below is not None and self._memory.worth(self.below.write + self.below.read):
            self.below.take(self, block, key, owner)

    def take(self, source: Shelf, block: int, key: bytes, owner: str) -> None:
        """Keep a copy of what `block` of `source` has, if it is not here already and not all blocks are being read."""
        known = self.pool.find(key)
        if known is not None:
            self.pool.refresh(known)
        elif (slot := self.pool.keep(key, owner)) is not None:
            self._memory.copies.append(BlockCopy(block, slot, source.name, self.name, key))


class Memory:
    """The device's blocks and the tiers beneath them, nearest first. `copies` are for the next plan to take.

    `mode` says when lower tiers are used: always (`swap`); for a request that was put back never (`recompute`); or as
    long as moving a block takes less time than computing its tokens did lately (`auto`).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        tiers: Sequence[Tier] = (),
        *,
        remember: bool = True,
        quota: float = 1.0,
        mode: PreemptionMode = "auto",
    ) -> None:
        self.remember, self.quota, self.mode = remember, quota, mode
        self.age = Age()
        self.copies: list[BlockCopy] = []
        self._block_size = block_size
        self._token_seconds = 0.0
        below: Shelf | None = None
        self.shelves: list[Shelf] = []
        for tier in (*reversed(tiers), Tier(DEVICE, num_blocks)):
            below = Shelf(tier, below, self)
            self.shelves.insert(0, below)
        self._device, *self.lower = self.shelves
        self.pool = self._device.pool
        self.pins = Pins(self.pool)

    def beneath(self, keys: Sequence[bytes], again: bool) -> int:
        """How many of `keys`, from the first on, can be had from some tier; `again` for a request that was put back."""
        if again and self.mode == "recompute":
            return 0
        usable = [shelf for shelf in self.shelves if self.worth(shelf.read)]
        for count, key in enumerate(keys):
            if all(shelf.pool.find(key) is None for shelf in usable):
                return count
        return len(keys)

    def worth(self, seconds: float) -> bool:
        """Whether that is a good price for the content of a block."""
        return self.mode != "auto" or seconds < self._token_seconds * self._block_size or not self._token_seconds

    def bring(self, keys: Sequence[bytes], owner: str) -> list[int]:
        """Blocks of the device for a new holder, with the content of `keys`, all of which `beneath` has found."""
        held: list[tuple[bytes, Shelf, int]] = []
        for key in keys:
            shelf, block = next((s, b) for s in self.shelves if (b := s.pool.find(key)) is not None)
            shelf.pool.share([block])  # so that nothing that comes now drives it out
            held.append((key, shelf, block))
        table = []
        for key, shelf, block in held:
            if shelf is not self._device:
                shelf.hits += 1
                source, (block,) = block, self.pool.alloc(1) or self._nothing(key)
                self.copies.append(BlockCopy(source, block, shelf.name, DEVICE, key))
                self._name(block, key, owner)
            table.append(block)
        for shelf in self.lower:
            shelf.pool.release([block for _, source, block in held if source is shelf])
        return table

    def publish(self, block: int, key: bytes, owner: str) -> None:
        """Remember what held `block` of the device has come to contain, in lasting tiers too."""
        if self._name(block, key, owner):
            for shelf in self.lower:
                if shelf.lasting:
                    shelf.take(self._device, block, key, owner)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Let this content be found nowhere any more, nor after a restart."""
        self.pins.drop(keys)
        for shelf in self.shelves:
            for slot in (found for key in keys if (found := shelf.pool.find(key)) is not None):
                shelf.pool.forget([slot])
                if shelf.lasting:
                    self.copies.append(BlockCopy(0, slot, DEVICE, shelf.name))

    def take_copies(self) -> list[BlockCopy]:
        copies, self.copies = self.copies, []
        return copies

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what a step and its copies have taken."""
        if not self.lower:
            return
        for shelf in self.lower:
            shelf.read, shelf.write = shelf.read * _FADE, shelf.write * _FADE
        shelves = {shelf.name: shelf for shelf in self.lower}
        for copy, seconds in zip(plan.copies, result.copy_seconds, strict=False):
            if copy.target_tier == DEVICE:
                shelf = shelves[copy.source_tier]
                shelf.read = _mean(shelf.read, seconds)
            else:
                shelf = shelves[copy.target_tier]
                shelf.write = _mean(shelf.write, seconds)
        if plan.num_tokens >= len(plan.rows) + self._block_size:  # else it says little of what prefill costs
            computing = result.seconds - sum(result.copy_seconds)
            self._token_seconds = _mean(self._token_seconds, computing / plan.num_tokens)

    def stats(self) -> list[TierStats]:
        return [TierStats(s.name, s.pool.num_blocks, s.pool.remembered, s.hits) for s in self.lower]

    def _name(self, block: int, key: bytes, owner: str) -> bool:
        news = self.pool.publish(block, key, owner)
        if news:
            self.pins.adopt(block, key)
        return news

    def _nothing(self, key: bytes) -> list[int]:
        raise RuntimeError(f"a block was promised for the content {key.hex()} but none is free")


def _mean(mean: float, value: float) -> float:
    return _KEEP * mean + (1 - _KEEP) * value if mean else value
