"""The scheduler under cancels, starvation and every depth: text, blocks and endings must always be right."""

from __future__ import annotations

from random import Random

import pytest
from harness import World, random_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ropeway.contract import FinishReason, GenerateRequest, SamplingParams
from ropeway.scheduler.sequence import State

SHAPES = [
    {"num_blocks": 26, "slots": 6},
    {"num_blocks": 26, "slots": 6, "depth": 2},
    {"num_blocks": 30, "slots": 12, "depth": 3, "max_step_tokens": 24},
    {"num_blocks": 26, "slots": 6, "policy": "priority", "depth": 2},
    {"num_blocks": 40, "slots": 6, "target_latency": True, "max_step_tokens": 64, "depth": 2},
    {"num_blocks": 26, "slots": 6, "prefix_caching": False},
    {"num_blocks": 26, "slots": 5, "static_batching": True},
    {"num_blocks": 26, "slots": 6, "chunked_prefill": False, "max_step_tokens": 64},
]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and are cancelled at any moment between and during steps."""

    @initialize(shape=st.sampled_from(SHAPES), seed=st.integers(0, 1 << 30))
    def start(self, shape: dict[str, object], seed: int) -> None:
        self.world = World(**shape)  # type: ignore[arg-type]
        self.random = Random(seed)
        self.rid = 0

    @rule(count=st.integers(1, 5))
    def submit(self, count: int) -> None:
        for _ in range(count):
            self.rid += 1
            self.world.submit(random_request(self.random, self.rid, self.world))

    @precondition(lambda self: self.rid > 0)
    @rule(pick=st.integers(0, 1 << 20))
    def cancel(self, pick: int) -> None:
        self.world.cancel(pick % self.rid + 1)

    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule()
    def explain(self) -> None:
        before = [seq.rid for seq in self.world.scheduler.waiting]
        for position, why in enumerate(self.world.scheduler.why(self.world.clock.now())):
            assert why.position == position
            assert why.reason
        assert sorted(before) == sorted(seq.rid for seq in self.world.scheduler.waiting)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.world.check_texts()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()
            self.world.check_home()
            self.world.check_texts()


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestScheduler = SchedulerMachine.TestCase


def _run(world: World, seed: int, requests: int, *, cancels: float = 0.0, check: bool = True) -> World:
    random = Random(seed)
    rid = 0
    while rid < requests or world.scheduler.busy:
        if rid < requests and len(world.scheduler.waiting) < 6:
            rid += 1
            world.submit(random_request(random, rid, world, longest=64))
        if rid and random.random() < cancels:
            world.cancel(random.randint(max(1, rid - 12), rid))
        world.step()
        if check:
            world.check()
    return world


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_a_hundred_thousand_steps(shape: dict[str, object]) -> None:
    """Over all shapes more than 10^5 steps with cancels under starvation, checked after every one."""
    world, seed = World(**shape), 0  # type: ignore[arg-type]
    while len(world.plans) < 15_000:
        world.requests.clear(), world.output.clear(), world.final.clear()
        seed += 1
        _run(world, seed, 150, cancels=0.03)
        world.check_home()
        world.check_texts()
    if shape["num_blocks"] != 30 and "static_batching" not in shape:
        assert world.scheduler.counters.preemptions > 20, "the pool was meant to starve"


@pytest.mark.parametrize("seed", range(6))
def test_starved_and_roomy_pools_give_the_same_text(seed: int) -> None:
    starved = _run(World(num_blocks=26, depth=1 + seed % 3), seed, 60)
    roomy = World(num_blocks=4000, slots=64, depth=1)
    for request in starved.requests.values():
        roomy.submit(request)
    roomy.finish_all()
    assert starved.scheduler.counters.preemptions > 0
    assert roomy.scheduler.counters.preemptions == 0
    assert starved.output == roomy.output


def test_the_same_calls_give_the_same_plans() -> None:
    one = _run(World(depth=2), 11, 80, cancels=0.05)
    two = _run(World(depth=2), 11, 80, cancels=0.05)
    assert one.plans == two.plans


def test_the_oldest_running_request_is_never_preempted() -> None:
    world = World(num_blocks=26, slots=6)
    random = Random(5)
    for rid in range(1, 60):
        world.submit(random_request(random, rid, world, longest=64))
    while world.scheduler.busy:
        oldest = world.scheduler.running[0] if world.scheduler.running else None
        world.step()
        if oldest is not None:
            assert oldest.state in (State.RUNNING, State.FINISHED)
    assert world.scheduler.counters.preemptions > 0


def test_static_batching_lets_nobody_board_until_the_batch_is_empty() -> None:
    # Steps wide enough for a whole batch of prompts, so that who is of a batch boards at once.
    world = _run(World(num_blocks=400, static_batching=True, slots=4, max_step_tokens=512), 3, 40)
    on_board: set[int] = set()
    for plan in world.plans:
        left = {rid for rid in on_board if rid not in {row.rid for row in plan.rows}}
        if plan.admit and left:
            # Someone of the last batch has left: then all of it must have.
            assert not on_board & {row.rid for row in plan.rows}
            on_board = set()
        on_board |= {admit.rid for admit in plan.admit}
        assert len(on_board) <= 4
    assert all(event.finish in (FinishReason.STOP, FinishReason.LENGTH) for event in world.final.values())


def test_a_static_batch_boards_past_those_who_came_before_it_in_the_line() -> None:
    world = World(num_blocks=400, static_batching=True, slots=4, max_step_tokens=16, policy="priority")
    tokens = list(range(20))
    for rid in range(4):  # a batch that cannot board within one step
        world.submit(GenerateRequest(rid=rid, tokens=tokens, sampling=SamplingParams(max_tokens=4), priority=5))
    world.step()
    for rid in range(4, 8):  # they stand first in the line now, but do not belong to the batch
        world.submit(GenerateRequest(rid=rid, tokens=tokens, sampling=SamplingParams(max_tokens=4), priority=0))
    world.finish_all()
    boarded = [admit.rid for plan in world.plans for admit in plan.admit]
    assert sorted(boarded[:4]) == [0, 1, 2, 3]
    assert len(world.final) == 8


def test_without_the_epoch_a_stale_result_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation check: if results of an earlier admission were not dropped, the texts above would be wrong."""
    from ropeway.scheduler.scheduler import Scheduler

    honest = Scheduler.commit

    def careless(self: Scheduler, plan, result, now):  # type: ignore[no-untyped-def]
        import msgspec

        def current(row):  # type: ignore[no-untyped-def]
            seq = self.sequences.get(row.rid)
            return row if seq is None else msgspec.structs.replace(row, epoch=seq.epoch)

        return honest(self, msgspec.structs.replace(plan, rows=[current(row) for row in plan.rows]), result, now)

    monkeypatch.setattr(Scheduler, "commit", careless)

    def forty_runs() -> None:
        for seed in range(40):
            world = _run(World(num_blocks=26, slots=6, depth=3), seed, 60)
            world.check_home()
            world.check_texts()

    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        forty_runs()
