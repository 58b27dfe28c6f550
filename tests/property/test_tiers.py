"""Tiers beneath the device's memory: swapped, kept, lost and found content must never change an answer."""

from __future__ import annotations

from random import Random

import pytest
from harness import World, random_request, request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ropeway.contract import BlockCopy, StepPlan, StepResult, Tier
from ropeway.errors import NeverFitsError, RequestError
from ropeway.kv import Memory
from ropeway.sim import CostModel, FakeExecutor

HOST, DISK = Tier("host", 30), Tier("disk", 60, lasting=True)
SHAPES = [
    {"tiers": (HOST,)},
    {"tiers": (Tier("host", 3), DISK), "depth": 2},
    {"tiers": (DISK,), "depth": 3, "slots": 12, "quota": 0.3},
    {"tiers": (HOST, Tier("disk", 8, lasting=True)), "mode": "auto", "policy": "priority", "quota": 0.5},
    {"tiers": (HOST, DISK), "mode": "recompute", "policy": "sjf"},
]


class TierMachine(RuleBasedStateMachine):
    """Requests, cancels, pins, restarts and damage, in any order."""

    @initialize(shape=st.sampled_from(SHAPES), seed=st.integers(0, 1 << 30), damage=st.sampled_from([0.0, 0.1]))
    def start(self, shape: dict[str, object], seed: int, damage: float) -> None:
        self.random = Random(seed)
        self.shape = {"num_blocks": 26, "slots": 6, **shape, "spoilt": lambda copy: self.random.random() < damage}
        self.world = World(**self.shape)  # type: ignore[arg-type]
        self.rid = 0

    @rule(count=st.integers(1, 5))
    def submit(self, count: int) -> None:
        for _ in range(count):
            self.rid += 1
            request = random_request(self.random, self.rid, self.world)
            try:
                self.world.submit(request)
            except NeverFitsError:
                assert self.world.scheduler.memory.pins.reserved > 0

    @precondition(lambda self: self.rid > 0)
    @rule(pick=st.integers(0, 1 << 20))
    def cancel(self, pick: int) -> None:
        self.world.cancel(pick % self.rid + 1)

    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule(name=st.sampled_from("pq"), length=st.integers(0, 30), family=st.integers(0, 3))
    def pin(self, name: str, length: int, family: int) -> None:
        scheduler = self.world.scheduler
        before = scheduler.pin("", [], "")
        try:
            scheduler.pin(name, [family * 7 + i % 5 for i in range(length)], "")
        except RequestError:
            assert scheduler.pin("", [], "") == before
        assert scheduler.memory.pins.reserved <= 26 // 4

    @precondition(lambda self: self.rid > 0)
    @rule()
    def restart(self) -> None:
        """The process dies; what a lasting tier had is there again."""
        kept = {t.name: self.world.executor.tiers[t.name] for t in self.world.tiers if t.lasting}
        self.world.check_texts()
        self.world = World(**{**self.shape, "kept": kept})  # type: ignore[arg-type]

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.world.check_texts()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()
            for pinned in self.world.scheduler.pin("", [], ""):
                self.world.scheduler.pin(pinned.name, [], "")
            self.world.check_home()
            self.world.check_texts()


TierMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestTiers = TierMachine.TestCase


def _computed(world: World) -> int:
    return sum(row.count for plan in world.plans for row in plan.rows)


def _crowd(**rest: object) -> World:
    """Eight requests grow until they drive each other out."""
    world = World(num_blocks=40, slots=8, max_step_tokens=64, **rest)  # type: ignore[arg-type]
    for rid in range(8):
        world.submit(request(rid, [rid] * 16, 50))
    world.finish_all()
    world.check_home()
    world.check_texts()
    assert world.scheduler.counters.preemptions > 0
    return world


def test_swapped_requests_are_not_computed_again() -> None:
    swap = _crowd(tiers=(Tier("host", 200),))
    # A request that is put back loses at most the block that was not full.
    assert _computed(swap) <= 8 * 65 + 4 * swap.scheduler.counters.preemptions
    assert swap.scheduler.memory.lower[0].hits > 0


def test_recompute_brings_nothing_back_to_who_was_put_back() -> None:
    world = _crowd(tiers=(Tier("host", 200),), mode="recompute")
    assert world.scheduler.memory.lower[0].hits == 0
    assert _computed(world) > _computed(_crowd(tiers=(Tier("host", 200),)))


def _learned(read: float, each: float) -> Memory:
    memory = Memory(8, 4, [Tier("host", 8)], mode="auto")
    memory.lower[0].pool.keep(b"k", "")
    copy = BlockCopy(0, 0, "host", "device", b"k")
    memory.learn(StepPlan(1, [], [], [], [copy]), StepResult(1, [], [], read, [read]))
    world = World(max_step_tokens=64)
    world.submit(request(1, [1] * 40))
    world.step()
    memory.learn(world.plans[0], StepResult(1, [[0]], [], each * 40))
    return memory


def test_auto_moves_a_block_only_while_that_is_faster_than_computing_it() -> None:
    assert _learned(read=0.003, each=0.001).beneath([b"k"], again=False) == 1
    slow = _learned(read=0.005, each=0.001)
    assert slow.beneath([b"k"], again=False) == 0
    for _ in range(1000):  # a tier that seemed slow gets another chance
        slow.learn(StepPlan(2, [], [], [], []), StepResult(2, []))
    assert slow.beneath([b"k"], again=False) == 1


def test_a_warm_prompt_is_a_hit_after_a_restart() -> None:
    first = World(num_blocks=40, tiers=(DISK,), max_step_tokens=64)
    prompt = list(range(40))
    first.submit(request(1, prompt, answer=1))  # its blocks are published by its last step
    first.finish_all()
    kept = {"disk": first.executor.tiers["disk"]}
    second = World(num_blocks=40, tiers=(DISK,), max_step_tokens=64, kept=kept)
    second.submit(request(2, [*prompt, 3, 3, 3]))
    second.finish_all()
    assert second.final[2].usage is not None
    assert second.final[2].usage.cached_tokens == 40
    second.check_texts()


def test_damaged_content_is_computed_again_and_offered_no_more() -> None:
    first = World(num_blocks=40, tiers=(DISK,), max_step_tokens=64)
    prompt = list(range(40))
    first.submit(request(1, prompt, answer=1))
    first.finish_all()
    kept = {"disk": first.executor.tiers["disk"]}
    second = World(num_blocks=40, tiers=(DISK,), max_step_tokens=64, depth=2, kept=kept, spoilt=lambda copy: True)
    for rid in (2, 3, 4):
        second.submit(request(rid, [*prompt, rid]))
    second.finish_all()
    second.check_home()
    second.check_texts()
    assert second.scheduler.counters.preemptions > 0


def test_what_a_failed_request_computed_does_not_outlive_it() -> None:
    world = World(num_blocks=40, tiers=(HOST, DISK), max_step_tokens=64)
    world.executor._fault = lambda rid, index: "NaN" if index == 20 else None
    world.submit(request(1, list(range(40)), answer=40))
    world.finish_all()
    assert world.final[1].finish == "failed"
    assert [key for key, _ in world.executor.tiers["disk"].values() if key] == []


def test_pinned_content_stays_and_others_are_told_what_is_left() -> None:
    world = World(num_blocks=40, max_step_tokens=64)
    prompt = list(range(36))
    world.scheduler.pin("system", prompt, "")
    world.submit(request(1, [*prompt, 1], answer=1))
    world.finish_all()
    [pinned] = world.scheduler.pin("", [], "")
    assert (pinned.name, pinned.tokens, pinned.blocks, pinned.cached) == ("system", 36, 9, 9)
    for rid in range(2, 12):
        world.submit(request(rid, [rid] * 60, answer=30))
    world.finish_all()
    world.submit(request(20, [*prompt, 2]))
    world.finish_all()
    assert world.final[20].usage is not None
    assert world.final[20].usage.cached_tokens == 36
    world.submit(request(21, [1] * 60, answer=36))
    with pytest.raises(RequestError, match="would be pinned, but at most 10 of 40"):
        world.scheduler.pin("more", [5] * 60, "")
    world.finish_all()
    with pytest.raises(RequestError, match="No prefix is pinned"):
        world.scheduler.pin("unknown", [], "")
    with pytest.raises(RequestError, match="shorter than one KV block"):
        world.scheduler.pin("short", [1, 2], "")
    assert world.scheduler.pin("system", [], "") == []
    world.check_home()


def test_a_pool_with_pins_refuses_what_no_longer_fits() -> None:
    world = World(num_blocks=20, max_model_len=200)
    world.submit(request(1, [1] * 60, answer=18))  # may need all 20 blocks
    with pytest.raises(RequestError, match="open requests leave 0"):
        world.scheduler.pin("system", list(range(8)), "")
    world.finish_all()
    world.scheduler.pin("system", list(range(8)), "")
    with pytest.raises(NeverFitsError, match="2 of them pinned"):
        world.submit(request(2, [1] * 60, answer=18))


def test_a_flooding_tenant_does_not_wash_out_the_others() -> None:
    def cached(quota: float) -> int:
        world = World(num_blocks=40, quota=quota, max_step_tokens=64)
        world.submit(request(1, list(range(40)), tenant="modest", salt="m"))
        world.finish_all()
        for rid in range(2, 30):
            world.submit(request(rid, [rid] * 40, tenant="flood", salt="f"))
            world.finish_all()
        world.submit(request(100, [*range(40), 1], tenant="modest", salt="m"))
        world.finish_all()
        usage = world.final[100].usage
        assert usage is not None
        return usage.cached_tokens

    assert (cached(1.0), cached(0.5)) == (0, 40)


def test_copies_take_time() -> None:
    world = World(tiers=(HOST,))
    executor = FakeExecutor(world.info, cost=CostModel(base=0.01, per_copy=0.5))
    plan = StepPlan(1, [], [], [], [BlockCopy(0, 0, "device", "host", b"k")])
    result = executor.collect(executor.submit(plan))
    assert (result.seconds, result.copy_seconds) == (0.51, [0.5])


def test_another_tenant_learns_nothing_from_what_a_prompt_costs() -> None:
    """What the probe in `benchmarks/cache_probe.py` times, in tokens and steps instead of seconds."""

    def cost(before: str, tenant: str) -> tuple[int, int, int]:
        world = World(num_blocks=40, tiers=(HOST, DISK), max_step_tokens=16)
        prompt = list(range(40))
        world.submit(request(1, prompt if before == "same" else prompt[::-1], tenant="victim", salt="victim"))
        world.finish_all()
        steps, tokens = len(world.plans), _computed(world)
        world.submit(request(2, prompt, tenant=tenant, salt=tenant))
        world.finish_all()
        usage = world.final[2].usage
        assert usage is not None
        return usage.cached_tokens, len(world.plans) - steps, _computed(world) - tokens

    assert cost("same", "attacker") == cost("other", "attacker")
    assert cost("same", "victim") != cost("other", "victim")
