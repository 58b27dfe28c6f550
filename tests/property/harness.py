"""Drives the real scheduler over the fake executor and keeps score of what must always hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from blind import Blind
from invariants import check
from ropeway.contract import (
    BlockCopy,
    ExecutorInfo,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    StepPlan,
    Tier,
    TokenEvent,
)
from ropeway.kv import PreemptionMode
from ropeway.scheduler import (
    FixedTokens,
    Forecast,
    MostToGo,
    Newest,
    Resources,
    Rules,
    Scheduler,
    TargetLatency,
    make_order,
)
from ropeway.sim import FakeExecutor, VirtualClock, expected_tokens
from ropeway.sim.executor import Content


@dataclass
class World:
    """A scheduler, an executor and every request's fate. Call `submit`, `cancel` and `step` in any order."""

    num_blocks: int = 40
    block_size: int = 4
    slots: int = 8
    max_model_len: int = 96
    max_step_tokens: int = 16
    depth: int = 1
    policy: str = "fcfs"
    rules: Rules = field(default_factory=lambda: Rules(promote_after=5.0, age_cap=2.0, quantum=20.0))
    prefix_caching: bool = True
    chunked_prefill: bool = True
    static_batching: bool = False
    vocab_size: int = 50
    target_latency: bool = False
    foresight: bool = False
    tiers: tuple[Tier, ...] = ()
    mode: PreemptionMode = "swap"
    quota: float = 1.0
    reserved: int = 0
    gap: float | None = 0.0
    spoilt: Callable[[BlockCopy], bool] = lambda copy: False
    kept: dict[str, dict[int, Content]] | None = None
    requests: dict[int, GenerateRequest] = field(default_factory=dict)
    output: dict[int, list[int]] = field(default_factory=dict)
    final: dict[int, TokenEvent] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.info = ExecutorInfo(
            model="fake", device="sim", dtype="none", num_blocks=self.num_blocks, block_size=self.block_size,
            max_slots=self.slots, max_model_len=self.max_model_len, vocab_size=self.vocab_size, depth=self.depth,
            tiers=list(self.tiers),
        )  # fmt: skip
        self.clock = VirtualClock()
        self.executor = FakeExecutor(self.info, clock=self.clock, spoilt=self.spoilt, kept=self.kept)
        self.scheduler = Scheduler(
            Resources(
                num_blocks=self.num_blocks, block_size=self.block_size, slots=self.slots,
                max_model_len=self.max_model_len, max_step_tokens=self.max_step_tokens,
                prefix_caching=self.prefix_caching, chunked_prefill=self.chunked_prefill,
                static_batching=self.static_batching, tiers=tuple(self.executor.info.tiers),
                tenant_quota=self.quota, preemption_mode=self.mode, reserved_seats=self.reserved,
                background_gap=self.gap,
            ),
            make_order(self.policy, self.rules),
            MostToGo() if self.policy.startswith("priority") else Newest(),
            TargetLatency(self.max_step_tokens, self.block_size)
            if self.target_latency
            else FixedTokens(self.max_step_tokens),
            Forecast() if self.foresight else Blind(),
        )  # fmt: skip
        self._under_way: deque[tuple[StepPlan, int]] = deque()

    def submit(self, request: GenerateRequest) -> None:
        self.scheduler.add(request, self.clock.now())
        self.requests[request.rid] = request
        self.output[request.rid] = []

    def cancel(self, rid: int) -> None:
        self._take(self.scheduler.cancel(rid, FinishReason.CANCELLED, self.clock.now()))

    def step(self) -> bool:
        """One turn of the engine's loop. False if there was nothing to do."""
        while len(self._under_way) < self.depth:
            plan = self.scheduler.plan(self.clock.now())
            if plan is None:
                break
            assert plan.num_tokens <= self.max_step_tokens
            assert len({row.slot for row in plan.rows}) == len(plan.rows)
            self.plans.append(plan)
            self._under_way.append((plan, self.executor.submit(plan)))
        if not self._under_way:
            assert not self.scheduler.busy, "requests wait but nothing can run"
            return False
        plan, ticket = self._under_way.popleft()
        for event in self.scheduler.commit(plan, self.executor.collect(ticket), self.clock.now()):
            self._take(event)
        return True

    def finish_all(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"not done after {limit} steps")

    def check(self) -> None:
        check(self.scheduler)

    def check_home(self) -> None:
        """Nothing runs or waits, and every block and slot is back."""
        self.check()
        assert not self.scheduler.busy
        assert self.scheduler.pool.available == self.num_blocks
        assert self.final.keys() == self.requests.keys()

    def check_texts(self) -> None:
        """Every answer is a beginning of the right one, and the whole of it if it was not cut short."""
        for rid, request in self.requests.items():
            right = expected_tokens(request, self.info)
            got = self.output[rid]
            event = self.final.get(rid)
            if event is not None and event.finish in (FinishReason.STOP, FinishReason.LENGTH):
                assert got == right, f"request {rid}"
            else:
                assert got == right[: len(got)], f"request {rid}"

    def _take(self, event: TokenEvent | None) -> None:
        if event is None:
            return
        assert event.rid not in self.final, f"request {event.rid} has news after its end"
        self.output[event.rid] += event.tokens
        if event.finish is not None:
            self.final[event.rid] = event


def request(
    rid: int, prompt: int | list[int] = 8, answer: int = 4, *, sampling: Mapping[str, Any] = {}, **fields: Any
) -> GenerateRequest:
    """With that prompt, or one of so many tokens."""
    tokens = [(rid * 7 + i) % 50 for i in range(prompt)] if isinstance(prompt, int) else prompt
    wishes = SamplingParams(max_tokens=answer, seed=rid, **sampling)
    return GenerateRequest(rid=rid, tokens=tokens, sampling=wishes, **fields)


def random_request(random: Random, rid: int, world: World, *, longest: int = 80) -> GenerateRequest:
    """A request that fits `world`: some share beginnings, some end by themselves, some by length."""
    pool_tokens = min(world.num_blocks * world.block_size, world.max_model_len, longest)
    if not world.chunked_prefill:
        pool_tokens = min(pool_tokens, world.max_step_tokens)
    prompt_len = random.randint(1, pool_tokens * 2 // 3)
    family = random.randrange(4)
    shared = [family * 7 + i % 5 for i in range(prompt_len)]
    own = random.randint(0, prompt_len)
    tokens = shared[: prompt_len - own] + [random.randrange(world.vocab_size) for _ in range(own)]
    return GenerateRequest(
        rid=rid,
        tokens=tokens,
        sampling=SamplingParams(
            max_tokens=random.randint(1, pool_tokens - prompt_len),
            min_tokens=random.choice([0, 0, 3]),
            stop_token_ids=(3,) if random.random() < 0.2 else (),
            seed=random.randrange(1 << 30),
        ),
        eos_ids=(7,) if random.random() < 0.7 else (),
        priority=random.randint(-1, 3),
        salt=random.choice(["", "", "tenant"]),
        tenant=random.choice(["", "a", "b"]),
    )
