"""How long KV blocks keep what they hold: a sample of them is followed, from plan to plan.

As vLLM does it (`--kv-cache-metrics`): a life begins when a block is handed out, a request that finds its content in
the prefix cache has asked for it once more, and it ends when the block is handed out again.
"""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise
from typing import Final

from ropeway.contract import StepPlan
from ropeway.contract.scene import BlockLife

ASKED: Final = 4
"""Times at which content was asked for that are remembered, the last."""


class Residence:
    """Follows the share `sample` (0 to 1) of all lives of blocks. `draw` gives numbers from 0 to 1."""

    def __init__(self, sample: float, draw: random.Random | None = None) -> None:
        self._sample = sample
        self._draw = (draw or random.Random()).random
        self._begun: dict[int, tuple[float, deque[float]]] = {}  # when, and when it was asked for since
        self._ended: list[BlockLife] = []

    def planned(self, plan: StepPlan, now: float) -> None:
        """The blocks that a step hands out and finds."""
        fetched = {copy.target for copy in plan.copies if copy.target_tier == "device"}
        for admit in plan.admit:
            for block in admit.blocks:
                if block in fetched:
                    fetched.discard(block)  # who boards after this one finds it
                    self._handed_out(block, now)
                elif block in self._begun:
                    self._begun[block][1].append(now)
        for row in plan.rows:
            for block in row.new_blocks:
                self._handed_out(block, now)

    def take(self) -> list[BlockLife]:
        """The lives that have ended since this was last asked."""
        ended, self._ended = self._ended, []
        return ended

    def _handed_out(self, block: int, now: float) -> None:
        if block in self._begun:
            begun, asked = self._begun.pop(block)
            gaps = [later - earlier for earlier, later in pairwise(asked)]
            self._ended.append(BlockLife(now - begun, now - (asked[-1] if asked else begun), gaps))
        if self._draw() < self._sample:
            self._begun[block] = now, deque(maxlen=ASKED)
