"""An executor that takes time and computes nothing: the limbs of a simulation."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from ropeway.contract import ExecutorInfo, StepPlan, StepResult
from ropeway.sim.clock import VirtualClock
from ropeway.sim.cost import CostModel

_NOTHING: list[int] = []
_NEVER: list[float] = []
_GOLDEN = 0.6180339887498949


class Spread:
    """Takes one of `parts` after the other, evenly from all of them, and the same every time (a Weyl sequence); 0 where
    there are none."""

    def __init__(self, parts: Sequence[float]) -> None:
        self._parts = parts
        self._turn = 0

    def take(self) -> float:
        if not self._parts:
            return 0.0
        self._turn += 1
        return self._parts[int(self._turn * _GOLDEN % 1.0 * len(self._parts))]


class TimedExecutor:
    """Answers every plan with tokens of no meaning, after the time that `cost` says.

    A sequence always says the same token, its request's seed, and its end token, if it has one, as soon as `min_tokens`
    lets it. So whoever makes the requests can foretell the answers, and a later turn of a conversation finds them in
    the prefix cache.

    `jitter` has what steps take beyond their cost without the executor's seeing it, now one part and now another: steps
    in which all rows decode, and others (see `Serving`). `copies` has the seconds in which a block goes to or comes
    from a tier, by the tier's name.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        cost: CostModel,
        clock: VirtualClock,
        *,
        jitter: tuple[Sequence[float], Sequence[float]] = ((), ()),
        copies: Mapping[str, float] | None = None,
    ) -> None:
        self.info = info
        self._cost = cost
        self._clock = clock
        self._jitter = Spread(jitter[0]), Spread(jitter[1])
        self._copies = {"device": 0.0, **(copies or {})}
        self._says: dict[int, list[int]] = {}
        self._ends: dict[int, tuple[int, list[int]]] = {}  # by slot: after how many computed tokens it says its end
        self._under_way: deque[tuple[StepResult, float]] = deque()
        self.emits = 0
        """Tokens that the last step yielded."""
        self.steps = 0
        self.computed = 0
        """Tokens of all steps, those computed a second time included."""
        self.seconds = 0.0

    def submit(self, plan: StepPlan) -> int:
        says, ends = self._says, self._ends
        for admit in plan.admit:
            says[admit.slot] = [admit.sampling.seed or 0]
            ends.pop(admit.slot, None)
            if admit.eos_ids:
                ends[admit.slot] = admit.prompt_len + admit.sampling.min_tokens - 1, [admit.eos_ids[0]]
        rows = plan.rows
        answers = [says[row.slot] if row.emit else _NOTHING for row in rows]
        tokens = plan.num_tokens
        context = sum([row.start for row in rows]) + tokens
        emits, pairs, chunks = sum([row.emit for row in rows]), 0, 0
        if tokens > len(rows) or ends:  # else all of them decode, and none can end by itself
            never = (-1, _NOTHING)
            for number, row in enumerate(rows):
                count = row.count
                if count != 1:
                    pairs += count * (2 * row.start + count + 1) // 2
                    chunks += 1
                last, end = ends.get(row.slot, never)
                if row.start + count == last:
                    answers[number] = end
        seconds, moved = self._cost.of(tokens, context, emits, pairs, chunks), _NEVER
        if plan.copies:
            moved = [self._copies[copy.source_tier] + self._copies[copy.target_tier] for copy in plan.copies]
            seconds += sum(moved)
        self.steps += 1
        self.computed += tokens
        self.seconds += seconds
        self.emits = emits
        passes = max(0.0, seconds + self._jitter[tokens > emits].take())
        self._under_way.append((StepResult(plan.step, answers, [], seconds, moved), passes))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        result, passes = self._under_way.popleft()
        if result.step != ticket:
            raise RuntimeError(f"step {ticket} was collected, but {result.step} is the oldest")
        self._clock.advance(passes)
        return result

    def close(self) -> None:
        """Holds nothing."""
