"""The loop: take commands, plan a step, have it carried out, tell the news."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from ropeway.config import EngineConfig, weights_of, whole_prompts
from ropeway.contract import Explained, Ordered, Pins, Ready, Report, Step, StepPlan, Stopped
from ropeway.contract.channel import Channel
from ropeway.contract.clock import Clock, SystemClock
from ropeway.contract.event import EngineStats, ErrorInfo, FinishReason, TokenEvent, with_extras
from ropeway.contract.executor import Executor
from ropeway.contract.message import Cancel, Command, Drain, Explain, Pin, Reorder, Submit
from ropeway.engine.intake import Intake
from ropeway.errors import ConfigError, EngineError, RequestError
from ropeway.scheduler import MostToGo, Order, Resources, Rules, Scheduler, make_order
from ropeway.scheduler.budget import Budget, FixedTokens, TargetLatency


def make_scheduler(config: EngineConfig, executor: Executor, secret: bytes) -> Scheduler:
    """The scheduler that `config` asks for, over what `executor` has."""
    info = executor.info
    config = config if info.generates else whole_prompts(config, info.max_model_len)
    slots, pause = min(config.max_num_seqs, info.max_slots), config.background_gap_ms
    in_parts = config.enable_chunked_prefill and config.batching == "continuous"
    resources = Resources(
        num_blocks=info.num_blocks, block_size=info.block_size, slots=slots, max_model_len=info.max_model_len,
        reserved_seats=min(config.reserved_seats, slots - 1), max_step_tokens=config.max_num_batched_tokens,
        prefix_caching=config.enable_prefix_caching, chunked_prefill=config.enable_chunked_prefill,
        static_batching=config.batching == "static", secret=secret, tiers=tuple(info.tiers),
        tenant_quota=config.kv_tenant_quota, preemption_mode=config.preemption_mode,
        background_gap=(pause and pause / 1000) if in_parts else 0.0,
    )  # fmt: skip
    return Scheduler(resources, policy_order(config), MostToGo(), make_budget(config))


def policy_order(config: EngineConfig, policy: str | None = None) -> Order:
    """The order that `policy` names (default: the configured one), by the rules in `config`. Raises ConfigError."""
    rules = Rules(
        promote_after=config.promote_after, age_cap=config.age_cap, weights=weights_of(config.tenant_weights),
        quantum=config.fair_quantum, patience=(0.0, config.promote_medium_after, config.promote_low_after),
    )  # fmt: skip
    return make_order(policy or config.scheduling_policy, rules)


def make_budget(config: EngineConfig) -> Budget:
    """Fixed where a prompt has to run whole, or where the user says so with a step budget of 0."""
    most, pause = config.max_num_batched_tokens, config.step_budget_ms
    if pause == 0 or not config.enable_chunked_prefill or config.batching == "static":
        return FixedTokens(most)
    return TargetLatency(most, config.block_size, None if pause is None else pause / 1000)


class Engine:
    """One executor kept busy with the requests of one service.
    `submit` and `step` are all there is; `run` connects them to a channel. Not thread-safe.
    """

    def __init__(
        self, executor: Executor, config: EngineConfig, *, clock: Clock | None = None, secret: bytes | None = None
    ) -> None:
        """`secret` keys the prefix cache (random unless a tier has kept one)."""
        self.executor = executor
        self._config = config
        self.scheduler = make_scheduler(config, executor, secret or executor.info.secret or os.urandom(32))
        self.intake = Intake(self.scheduler, config.max_queue)
        self._clock = clock or SystemClock()
        self._under_way: deque[tuple[StepPlan, Any]] = deque()
        self._news: list[TokenEvent] = []
        self._last = (0, 0, 0, 0.0)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.busy or bool(self._under_way) or bool(self._news)

    def submit(self, commands: Sequence[Command]) -> list[Report]:
        """Take commands in; what can be answered at once is returned."""
        now = self._clock.now()
        reports: list[Report] = []
        for command in commands:
            match command:
                case Submit(request):
                    self._news.append(self.intake.accept(request, now))
                case Cancel(rid, stop):
                    reason = FinishReason.STOP if stop else FinishReason.CANCELLED
                    event = self.scheduler.cancel(rid, reason, now)
                    self._news += [event] if event is not None else []
                case Explain(token, rids, most):
                    reports.append(Explained(token, self.scheduler.why(now, rids, most)))
                case Reorder(token, policy):
                    reports.append(self._reorder(token, policy, now))
                case Pin():
                    reports.append(self._pin(command))
                case Drain():
                    self.intake.draining = True
        if self._news:
            # Told now rather than with the next step, so that nobody waits a step to hear that it was let in.
            reports.append(Step(self._take_news(), self._stats()))
        return reports

    def step(self) -> Step:
        """Run one step and return its news. Keeps up to the executor's depth of steps under way.

        Raises EngineError if requests are there but none can go on, which would be a fault of the scheduler.
        """
        self._news += self.intake.expire(self._clock.now())
        while len(self._under_way) < self.executor.info.depth:
            plan = self.scheduler.plan(self._clock.now())
            if plan is None:
                break
            self.intake.boarded += [self._clock.now() for admitted in plan.admit if admitted.epoch == 1]
            self._under_way.append((plan, self.executor.submit(plan)))
        if self._under_way:
            plan, ticket = self._under_way.popleft()
            result = self.executor.collect(ticket)
            self._news += with_extras(self.scheduler.commit(plan, result, self._clock.now()), result.extras)
            self._last = (plan.step, len(plan.rows), plan.num_tokens, result.seconds)
        elif self.scheduler.busy:
            reasons = "; ".join(f"request {why.rid}: {why.reason}" for why in self.scheduler.why(self._clock.now())[:3])
            raise EngineError(f"{len(self.scheduler.waiting)} requests wait but none can run ({reasons}).")
        return Step(self._take_news(), self._stats())

    def run(self, channel: Channel) -> None:
        """Serve `channel` until the service goes away or a drain has finished. Blocks while there is nothing to do."""
        channel.send(Ready(self.executor.info.public()))
        while self.busy or not self.intake.draining:
            commands = channel.recv(wait=not self.busy)
            if commands is None:
                return
            for report in self.submit(commands) if commands else ():
                channel.send(report)
            if self.busy:
                channel.send(self.step())
        channel.send(Stopped())

    def close(self) -> None:
        """Free the executor. No step is under way."""
        self.executor.close()

    def _reorder(self, token: int, policy: str, now: float) -> Ordered:
        error = None
        try:
            if policy:
                self.scheduler.reorder(policy_order(self._config, policy), now)
        except ConfigError as refusal:
            error = ErrorInfo.of(refusal)
        return Ordered(token, self.scheduler.waiting.order.name, len(self.scheduler.waiting), error)

    def _pin(self, pin: Pin) -> Pins:
        try:
            return Pins(pin.token, self.scheduler.pin(pin.name, pin.tokens, pin.salt))
        except RequestError as refusal:
            return Pins(pin.token, self.scheduler.pin("", [], ""), ErrorInfo.of(refusal))

    def _take_news(self) -> list[TokenEvent]:
        news, self._news = self._news, []
        return news

    def _stats(self) -> EngineStats:
        scheduler, counters = self.scheduler, self.scheduler.counters
        pool = scheduler.pool
        step, rows, tokens, seconds = self._last
        aboard, waiting = [seq.urgency for seq in scheduler.running], scheduler.waiting.count
        return EngineStats(
            step=step, running=len(scheduler.running), waiting=len(scheduler.waiting),
            slots=scheduler.resources.slots, blocks_total=pool.num_blocks, blocks_used=pool.used,
            blocks_cached=pool.remembered, rows=rows, step_tokens=tokens, step_seconds=seconds,
            prompt_tokens=counters.prompt_tokens, generation_tokens=counters.generation_tokens,
            cache_queries=counters.cache_queries, cache_hits=counters.cache_hits, preemptions=counters.preemptions,
            tiers=scheduler.memory.stats(), urgencies=[(aboard.count(n), count) for n, count in enumerate(waiting)],
        )  # fmt: skip
