"""An executor that takes time and computes nothing: the limbs of a simulation."""

from __future__ import annotations

from collections import deque

from ropeway.contract import ExecutorInfo, StepPlan, StepResult
from ropeway.sim.clock import VirtualClock
from ropeway.sim.cost import CostModel

_NOTHING: list[int] = []


class TimedExecutor:
    """Answers every plan with tokens of no meaning, after the time that `cost` says.

    A sequence always says the same token, its request's seed: whoever makes the requests can therefore foretell the
    answers, and a later turn of a conversation finds them in the prefix cache. It ends by its length.

    `loop` is what the engine adds to a step, and to each row of it that yields a token: time that passes, but that an
    executor does not see.
    """

    def __init__(
        self, info: ExecutorInfo, cost: CostModel, clock: VirtualClock, *, loop: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.info = info
        self._cost = cost
        self._clock = clock
        self._loop_step, self._loop_row = loop
        self._loops: deque[float] = deque()
        self._says: dict[int, list[int]] = {}
        self._under_way: deque[StepResult] = deque()
        self.steps = 0
        self.computed = 0
        """Tokens of all steps, those computed a second time included."""
        self.seconds = 0.0

    def submit(self, plan: StepPlan) -> int:
        says = self._says
        for admit in plan.admit:
            says[admit.slot] = [admit.sampling.seed or 0]
        rows = plan.rows
        answers = [says[row.slot] if row.emit else _NOTHING for row in rows]
        # Most rows decode one token; sums over those need no arithmetic but one.
        context = sum([row.start for row in rows])
        tokens = emits = len(rows)
        pairs = chunks = 0
        for row in rows:
            count = row.count
            if count != 1:
                tokens += count - 1
                pairs += count * (2 * row.start + count + 1) // 2
                chunks += 1
            emits -= not row.emit
        seconds = self._cost.of(tokens, context + tokens, emits, pairs, chunks, len(plan.copies))
        self.steps += 1
        self.computed += tokens
        self.seconds += seconds
        self._loops.append(self._loop_step + self._loop_row * emits)
        self._under_way.append(StepResult(plan.step, answers, [], seconds))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        result = self._under_way.popleft()
        if result.step != ticket:
            raise RuntimeError(f"step {ticket} was collected, but {result.step} is the oldest")
        self._clock.advance(result.seconds + self._loops.popleft())
        return result

    def close(self) -> None:
        """Holds nothing."""
