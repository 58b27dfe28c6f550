"""What a step costs, in seconds: the one thing about a machine that scheduling needs to know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ropeway.contract import Row, StepPlan


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step:

        base + per_token * tokens + sum of slope * max(0, tokens - knee) over `bends`
             + per_emit * rows that yield a token + per_context * KV tokens read
             + per_pair * (query, key) pairs in rows of several tokens + per_prefix_row * such rows

    A machine that reads the weights once a step, however few its tokens, and then is bound by arithmetic is
    `base` = the reading and one bend at the roofline's knee (Williams, Waterman and Patterson 2009). A measured machine
    has several bends. `per_copy` is added for each KV block that the plan copies between tiers.
    """

    base: float = 0.01
    per_token: float = 0.0005
    per_context: float = 0.0
    per_emit: float = 0.0
    per_pair: float = 0.0
    per_prefix_row: float = 0.0
    per_copy: float = 0.0
    bends: tuple[tuple[int, float], ...] = ()

    def seconds(self, plan: StepPlan) -> float:
        return self.of(*work(plan.rows), len(plan.copies))

    def of(self, tokens: int, context: int, emits: int, pairs: int = 0, chunks: int = 0, copies: int = 0) -> float:
        """The same from sums over the rows of a step."""
        total = self.base + self.per_token * tokens + self.per_emit * emits + self.per_context * context
        for knee, slope in self.bends:
            if tokens > knee:
                total += slope * (tokens - knee)
        return total + self.per_pair * pairs + self.per_prefix_row * chunks + self.per_copy * copies


def work(rows: Iterable[Row]) -> tuple[int, int, int, int, int]:
    """What `CostModel.of` wants to know of `rows`, copies apart, in its order."""
    tokens = context = emits = pairs = chunks = 0
    for row in rows:
        count = row.count
        tokens += count
        context += row.start + count
        emits += row.emit
        if count > 1:
            pairs += count * (2 * row.start + count + 1) // 2
            chunks += 1
    return tokens, context, emits, pairs, chunks
