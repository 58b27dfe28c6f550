"""Three classes in one batch: background work takes what interactive requests leave, gives it back, never starves."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import harness
import pytest
from harness import World, random_request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from msgspec.structs import replace
from test_orders import PLAIN, POLICIES, RULES, Platform, _class, _late
from test_scheduler import SchedulerMachine

from ropeway.contract import FinishReason, GenerateRequest, SamplingParams, StepPlan, Urgency
from ropeway.scheduler import Rules
from ropeway.scheduler.limits import ANYBODY

HIGH, MEDIUM, LOW = Urgency
PATIENT = Rules(promote_after=5.0, age_cap=2.0, quantum=20.0, patience=(0.0, 1e9, 1e9))
SHAPES: list[dict[str, Any]] = [
    {"num_blocks": 26, "slots": 6},
    {"num_blocks": 26, "slots": 6, "depth": 2, "reserved": 2, "gap": None, "target_latency": True},
    {"num_blocks": 30, "slots": 12, "depth": 3, "max_step_tokens": 24, "gap": 0.012, "foresight": True},
    {"num_blocks": 26, "slots": 4, "policy": "priority:sjf", "gap": None},
    {"num_blocks": 40, "slots": 6, "policy": "fair", "gap": 0.02, "target_latency": True, "max_step_tokens": 64},
    {"num_blocks": 26, "slots": 6, "prefix_caching": False, "policy": "deadline", "gap": None},
    {"num_blocks": 26, "slots": 5, "static_batching": True},
    {"num_blocks": 26, "slots": 6, "chunked_prefill": False, "max_step_tokens": 64, "reserved": 1},
]


def request(rid: int, urgency: Urgency, prompt: int = 8, answer: int = 6, **fields: Any) -> GenerateRequest:
    return harness.request(rid, prompt, answer, urgency=urgency, salt=str(rid), **fields)


class Watched(World):
    """A world that looks after each plan whether background work has kept behind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        honest = self.scheduler.plan

        def plan(now: float) -> StepPlan | None:
            before = {seq.rid: seq.preemptions for seq in self.scheduler.sequences.values()}
            made = honest(now)
            self._judge(made, before)
            return made

        self.scheduler.plan = plan  # type: ignore[method-assign]

    def _judge(self, plan: StepPlan | None, before: dict[int, int]) -> None:
        scheduler = self.scheduler
        sequences = scheduler.sequences
        put_back = [seq for seq in scheduler.waiting if seq.preemptions > before[seq.rid]]
        for seq in put_back:
            worse = [rider.rid for rider in scheduler.running if rider.urgency > seq.urgency]
            assert not worse, f"{seq.rid} gave way while {worse} did not"
        if plan is None:
            return
        boarded = [sequences[admit.rid] for admit in plan.admit if admit.rid in sequences]
        for seq in boarded:
            held = [other for other in scheduler.waiting if other.urgency < seq.urgency and not self._may_wait(other)]
            assert not held, f"{seq.rid} boarded before {[other.rid for other in held]}"
        if any(seq.urgency for seq in boarded):
            assert len(scheduler._limits.slots.free) >= self.reserved

    def _may_wait(self, seq: Any) -> bool:
        """Whether `seq` waits for something that lets anybody pass it."""
        self.scheduler._match(seq)
        limits = [limit for limit in self.scheduler._limits._all if limit.passes == ANYBODY]
        held = any(limit.cap(seq, 1) <= 0 for limit in limits)
        seq.blocks, seq.computed = [], 0
        return held


class BackfillMachine(SchedulerMachine):
    """The machine that the scheduler has to survive, with requests of all urgencies."""

    @initialize(shape=st.sampled_from(SHAPES), seed=st.integers(0, 1 << 30))
    def start(self, shape: dict[str, Any], seed: int) -> None:
        rules = Rules(promote_after=5.0, age_cap=2.0, quantum=20.0, patience=(0.0, 0.5, 2.0))
        self.world = Watched(rules=rules, **shape)
        self.random = Random(seed)
        self.rid = 0

    @rule(number=st.integers(1, 5))
    def submit(self, number: int) -> None:
        for _ in range(number):
            self.rid += 1
            mixed = replace(
                random_request(self.random, self.rid, self.world), urgency=self.random.choice(list(Urgency))
            )
            self.world.submit(mixed)


BackfillMachine.TestCase.settings = SchedulerMachine.TestCase.settings
TestBackfill = BackfillMachine.TestCase


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_mixed_work_under_starvation_keeps_texts_books_and_ranks(shape: dict[str, Any]) -> None:
    random, world = Random(3), Watched(rules=Rules(promote_after=5.0, age_cap=2.0, patience=(0.0, 0.6, 2.5)), **shape)
    for rid in range(1, 400):
        urgency = random.choices(list(Urgency), (2, 1, 3))[0]
        world.submit(replace(random_request(random, rid, world, longest=64), urgency=urgency))
        while len(world.scheduler.waiting) > 8:
            world.step()
            world.check()
        if random.random() < 0.03:
            world.cancel(random.randint(max(1, rid - 12), rid))
        if random.random() < 0.1:
            world.scheduler.why(world.clock.now())
    world.finish_all()
    world.check_home()
    world.check_texts()
    assert not any(world.scheduler.waiting.count)


def _high_rows(world: World, plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(row.rid, row.start, row.count) for row in plan.rows if world.requests[row.rid].urgency is HIGH]


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 6), reserved=st.integers(0, 2))
def test_interactive_requests_run_as_if_they_were_alone(seed: int, slots: int, reserved: int) -> None:
    """Row by row: with memory for all, a backlog changes nothing of what interactive requests compute in each step."""

    def run(backlog: bool) -> list[list[tuple[int, int, int]]]:
        random, rids = Random(seed), count(10_000)
        world = World(
            num_blocks=4000, slots=slots, prefix_caching=False, rules=PATIENT, reserved=min(reserved, slots - 1)
        )  # fmt: skip
        seen = []
        for tick in range(150):
            if tick < 100 and random.random() < 0.3:
                world.submit(request(tick, HIGH, random.randint(1, 30), random.randint(1, 12)))
            while backlog and len(world.scheduler.waiting) < 5:
                rid = next(rids)
                world.submit(request(rid, Urgency(1 + rid % 2), 1 + rid % 23, 1 + rid % 17))
            planned = len(world.plans)
            world.step()
            seen.append([row for plan in world.plans[planned:] for row in _high_rows(world, plan)])
        return seen

    assert run(backlog=True) == run(backlog=False)


def test_a_backlog_alone_runs_as_interactive_requests_would() -> None:
    """Nobody is there to be considerate of: every seat and every token is used."""

    def run(urgency: Urgency, **shape: Any) -> list[StepPlan]:
        world, random = World(num_blocks=60, slots=6, rules=PATIENT, target_latency=True, **shape), Random(1)
        for rid in range(1, 80):
            world.submit(replace(random_request(random, rid, world), urgency=urgency))
        world.finish_all()
        return world.plans

    assert run(LOW, gap=None) == run(MEDIUM, gap=0.0) == run(HIGH)


def test_nothing_idles_that_background_work_could_use() -> None:
    """After each plan: whoever is first in line lacks something."""
    world, random = World(num_blocks=60, slots=6, max_step_tokens=64, rules=PATIENT, gap=0.02), Random(5)
    scheduler, rids, watched = world.scheduler, count(1), list[int]()
    honest = scheduler.plan

    def plan(now: float) -> StepPlan | None:
        paused = scheduler._last.calm < len(Urgency)
        made = honest(now)
        first = next(scheduler.waiting.line(now))
        if not paused and scheduler._last.calm == len(Urgency):
            scheduler._match(first)
            allowed, holder = scheduler._limits.cap(first)
            first.blocks, first.computed = [], 0
            assert allowed <= 0
            assert holder is not None
            watched.append(first.urgency)
        return made

    scheduler.plan = plan  # type: ignore[method-assign]
    for _ in range(600):
        while len(scheduler.waiting) < 6:
            likely = random.choices(list(Urgency), (3, 2, 2))[0]
            world.submit(replace(random_request(random, next(rids), world), urgency=likely))
        world.step()
    assert min(watched.count(urgency) for urgency in (MEDIUM, LOW)) > 50


# Giving way


def test_an_interactive_request_takes_a_seat_at_once_and_the_least_urgent_gives_it() -> None:
    world = World(num_blocks=400, slots=3, max_step_tokens=64, rules=PATIENT)
    for rid, urgency in ((1, LOW), (2, MEDIUM), (3, LOW)):
        world.submit(request(rid, urgency, answer=60))
    for _ in range(20):
        world.step()
    before = len(world.output[3])
    world.submit(request(4, HIGH, answer=3))
    why = world.scheduler.why(world.clock.now(), [4])[0]
    assert why.reason == "it boards with the next step"
    world.step()
    assert [admit.rid for admit in world.plans[-1].admit] == [4]
    assert {row.rid for row in world.plans[-1].rows} == {1, 2, 4}
    world.finish_all()
    world.check_texts()
    again = next(admit for plan in world.plans for admit in plan.admit if admit.rid == 3 and admit.epoch == 2)
    assert again.computed >= (8 + before) // world.block_size * world.block_size - world.block_size, "blocks were kept"
    assert world.final[3].usage is not None
    assert world.final[3].usage.preemptions == 1
    assert world.final[2].usage.preemptions == 0  # type: ignore[union-attr]


def test_an_interactive_request_takes_blocks_at_once() -> None:
    world = World(num_blocks=20, slots=8, max_step_tokens=64, max_model_len=80, rules=PATIENT)
    for rid in (1, 2, 3):
        world.submit(request(rid, LOW, prompt=20, answer=4))
    world.step()
    reserve = world.scheduler._forecast.reserve
    world.submit(request(4, HIGH, prompt=40, answer=20))
    world.step()
    assert [admit.rid for admit in world.plans[-1].admit] == [4]
    assert world.scheduler.counters.preemptions >= 1
    assert world.scheduler._forecast.reserve == reserve, "making room for others is no error of the forecast"
    world.finish_all()
    world.check_home()
    world.check_texts()


def test_nobody_waits_for_a_beginning_that_background_work_computes() -> None:
    world = World(num_blocks=400, slots=8, max_step_tokens=24, max_model_len=128, rules=PATIENT)
    start = list(range(40))
    for rids, urgency in (((1,), LOW), ((2, 3), HIGH)):
        for rid in rids:
            sampling = SamplingParams(max_tokens=4, seed=rid)
            world.submit(GenerateRequest(rid=rid, tokens=[*start, rid], sampling=sampling, urgency=urgency))
        world.step()
    assert [admit.rid for plan in world.plans for admit in plan.admit] == [1, 2], "the third waits for the second"
    world.finish_all()
    world.check_texts()


def test_reserved_seats_stay_free_of_background_work() -> None:
    world = World(num_blocks=400, slots=4, reserved=2, max_step_tokens=64, rules=PATIENT)
    for rid in range(1, 9):
        world.submit(request(rid, LOW, answer=20))
    world.step()
    assert len(world.scheduler.running) == 2
    assert "kept for interactive requests (2)" in world.scheduler.why(world.clock.now())[0].reason
    for rid in (11, 12):
        world.submit(request(rid, HIGH, answer=20))
    world.step()
    assert len(world.scheduler.running) == 4
    assert world.scheduler.counters.preemptions == 0
    world.finish_all()
    world.check_home()


# Nobody starves


@pytest.mark.parametrize("policy", ["fcfs", "priority", "priority:sjf", "hrrn", "prefix", "fair"])
def test_background_work_boards_in_time_beside_endless_interactive_work(policy: str) -> None:
    """It waits until its time has come, since interactive requests always do; then it stands by its time of arrival."""
    patience = (0.0, 2.0, 6.0)
    world = World(
        num_blocks=400, slots=2, max_step_tokens=32, policy=policy,
        rules=Rules(promote_after=1.0, age_cap=0.5, quantum=0.0, patience=patience),
    )  # fmt: skip
    rids = count(1)
    world.submit(request(next(rids), HIGH, tenant="a"))
    for rid, urgency in ((1001, LOW), (1002, MEDIUM), (1003, LOW)):
        world.submit(request(rid, urgency, tenant="b"))
    slow = 0.0
    while world.scheduler.busy and world.clock.now() < 30:
        while sum(seq.urgency == HIGH for seq in world.scheduler.waiting) < 4:
            world.submit(request(next(rids), HIGH, tenant="a"))
        begun = world.clock.now()
        world.step()
        slow = max(slow, world.clock.now() - begun)
        if {1001, 1002, 1003} <= world.final.keys():
            break
    for rid in (1001, 1002, 1003):
        waited = world.final[rid].usage.first_scheduled_s  # type: ignore[union-attr]
        due = patience[world.requests[rid].urgency]
        assert waited is not None
        # From then on it is one of some ten interactive requests, each of which rides for less than ten steps.
        assert due - slow <= waited <= due + 100 * slow


def _after_streams(gap: float, patience: float) -> World:
    """One that has learned what steps cost, from interactive requests that are over."""
    world = World(
        num_blocks=400, slots=4, max_step_tokens=32, rules=Rules(patience=(0.0, patience, patience)), gap=gap
    )  # fmt: skip
    for rid in range(1, 5):
        world.submit(request(rid, HIGH, answer=5 * rid))
    world.finish_all()
    return world


def test_a_row_that_pauses_is_interactive_when_its_time_has_come() -> None:
    """Beside a stream that allows nothing, it keeps its seat and runs no step until then."""
    world = _after_streams(1e-9, 1.0)
    came, rids, ran = world.clock.now(), count(10), list[float]()
    world.submit(request(9, LOW, answer=12))
    world.step()
    while 9 not in world.final:
        while sum(not seq.urgency for seq in world.scheduler.running) + len(world.scheduler.waiting) < 2:
            world.submit(request(next(rids), HIGH, answer=80))
        begun = world.clock.now()
        world.step()
        ran += [begun for row in world.plans[-1].rows if row.rid == 9]
    assert ran[0] == pytest.approx(came + 1.0, abs=0.03)
    assert len(ran) == 11, "all but the token of its first step"
    assert world.final[9].usage.preemptions == 0  # type: ignore[union-attr]
    world.check_texts()


def test_why_names_interactive_work_and_how_long_it_stands_first() -> None:
    world = _after_streams(1e-9, 3600.0)
    world.submit(request(7, HIGH, answer=60))
    world.step()
    for rid in (8, 9):
        world.submit(request(rid, LOW))
    first, second = world.scheduler.why(world.clock.now())
    assert first.holder == "tokens"
    assert "beside interactive requests" in first.reason
    assert "background work, which boards after interactive requests for 3600 s yet" in second.reason


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("classes", [False, True])
@settings(max_examples=40)
@given(
    people=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 3.0]), st.integers(1, 40), st.integers(-1, 2), st.sampled_from(Urgency)),
        min_size=2,
        max_size=14,
    ),
    gaps=st.lists(st.floats(0, 9), max_size=6),
)
def test_urgency_stands_before_every_order_until_its_time_has_come(
    name: str, classes: bool, people: list[tuple[float, int, int, Urgency]], gaps: list[float]
) -> None:
    patience = (0.0, 4.0, 11.0)
    rules = Rules(promote_after=RULES.promote_after, age_cap=RULES.age_cap, quantum=0.0, patience=patience)
    p = Platform(f"priority:{name}" if classes else name, rules)
    for gap, prompt, priority, urgency in people:
        p.now += gap
        p.add(prompt, priority=priority, urgency=urgency)
    for gap in (0.0, *gaps):
        p.now += gap

        def expected(seq: Any) -> tuple[float, ...]:
            asked = seq.request.urgency
            return (
                asked if p.now < seq.arrival + patience[asked] else 0,
                _class(p, seq) * classes + _late(p, seq) * (name == "deadline"),
                *PLAIN[name](p, seq),
                seq.number,
            )

        line = p.line()
        assert [seq.number for seq in line] == [seq.number for seq in sorted(p.people, key=expected)]
        assert p.room.count == [sum(expected(seq)[0] == urgency for seq in p.people) for urgency in Urgency]


def test_every_policy_serves_the_urgent_first() -> None:
    for policy in POLICIES:
        p = Platform(policy)
        for urgency in (LOW, MEDIUM, HIGH, LOW, HIGH):
            p.add(urgency=urgency, tenant=str(urgency))
        assert [seq.urgency for seq in p.line()] == [0, 0, 1, 2, 2], policy


def test_cancelled_background_work_leaves_nothing_behind() -> None:
    world = World(num_blocks=60, slots=2, rules=PATIENT)
    for rid in range(6):
        world.submit(request(rid, LOW, answer=30))
    world.step()
    for rid in range(6):
        world.cancel(rid)
    world.finish_all()
    world.check_home()
    assert {event.finish for event in world.final.values()} == {FinishReason.CANCELLED}
