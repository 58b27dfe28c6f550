"""Who boards next: each order against its definition written down plainly, and what each promises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import pytest
from harness import World, random_request, request
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.contract import FinishReason, GenerateRequest
from ropeway.errors import ConfigError, DeadlineError, OverloadedError
from ropeway.scheduler import ORDERS, Rules, make_order
from ropeway.scheduler.sequence import Sequence
from ropeway.scheduler.waiting import WaitingRoom

RULES = Rules(promote_after=5.0, age_cap=8.0, quantum=0.0)
POLICIES = [*ORDERS, "priority", *(f"priority:{name}" for name in ORDERS if name != "fcfs")]


class Platform:
    """A waiting room, and the same people in a plain list."""

    def __init__(self, policy: str, rules: Rules = RULES) -> None:
        self.looked_up = 0
        self.cached: dict[int, int] = {}
        self.room = WaitingRoom(make_order(policy, rules), self._look_up)
        self.people: list[Sequence] = []
        self.numbers = count(1)
        self.urgent = 0
        self.now = 0.0

    def _look_up(self, seq: Sequence) -> int:
        self.looked_up += 1
        return self.cached.get(seq.number, 0)

    def add(self, prompt: int = 8, cached: int = 0, **fields: Any) -> Sequence:
        number = next(self.numbers)
        seq = Sequence(request(number, prompt, **fields), number, self.now, 1 << 62)
        self.cached[number] = min(cached, prompt - 1)
        self.room.add(seq, self.now)
        self.people.append(seq)
        self.urgent = min(self.urgent, seq.request.priority)
        return seq

    def remove(self, seq: Sequence) -> None:
        self.room.remove(seq)
        self.people.remove(seq)

    def line(self) -> list[Sequence]:
        return list(self.room.line(self.now))

    def work(self, seq: Sequence) -> int:
        return seq.prompt_len - self.cached[seq.number]

    def wait(self, seq: Sequence) -> float:
        return self.now - seq.arrival


Plain = Callable[[Platform, Sequence], tuple[float, ...]]


def _aged(p: Platform, seq: Sequence) -> bool:
    return p.now >= seq.arrival + RULES.age_cap


def _late(p: Platform, seq: Sequence) -> int:
    wanted = seq.request.ttft_deadline_s
    over = p.now - (seq.arrival + wanted) if wanted is not None else -1.0
    return max(0, 10 - int(over / RULES.promote_after)) if over >= 0 else 0


def _due(seq: Sequence) -> float:
    return seq.arrival + (RULES.promote_after if seq.request.ttft_deadline_s is None else seq.request.ttft_deadline_s)


PLAIN: dict[str, Plain] = {
    "fcfs": lambda p, seq: (),
    "sjf": lambda p, seq: (0,) if _aged(p, seq) else (1, p.work(seq)),
    "prefix": lambda p, seq: (0,) if _aged(p, seq) else (1, -p.cached[seq.number]),
    "deadline": lambda p, seq: (0 if _late(p, seq) else _due(seq),),
}
"""What stands before the order of arrival in each order's key."""


def _class(p: Platform, seq: Sequence) -> int:
    return max(p.urgent, seq.request.priority - int(p.wait(seq) / RULES.promote_after))


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[float, int, int, int, float | None]]:
    person = st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(1, 40), st.integers(0, 40), st.integers(-1, 2),
        st.sampled_from([None, 1.0, 4.0]),
    )  # fmt: skip
    return draw(st.lists(person, min_size=2, max_size=14))


def _fill(p: Platform, people: list[tuple[float, int, int, int, float | None]]) -> None:
    for gap, prompt, cached, priority, wanted in people:
        p.now += gap
        p.add(prompt, cached, priority=priority, ttft_deadline_s=wanted)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("classes", [False, True])
@settings(max_examples=60)
@given(people=arrivals(), picks=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 99)), max_size=6))
def test_the_line_is_what_the_definition_says(
    name: str, classes: bool, people: list[tuple[float, int, int, int, float | None]], picks: list[tuple[float, int]]
) -> None:
    """At every moment, after arrivals and departures: classes, caps on age, promotion, relegation and ties included."""
    p = Platform(f"priority:{name}" if classes else name)
    _fill(p, people)
    for gap, pick in [(0.0, 0), *picks]:
        if p.people and gap:
            p.remove(p.people[pick % len(p.people)])
        p.now += gap
        if not p.people:
            break
        expected = sorted(
            p.people,
            key=lambda seq: (
                _class(p, seq) * classes + _late(p, seq) * (name == "deadline"),
                *PLAIN[name](p, seq),
                seq.number,
            ),
        )
        assert [seq.number for seq in p.line()] == [seq.number for seq in expected]


@settings(max_examples=100)
@given(people=arrivals(), gap=st.floats(0.01, 30))
def test_response_ratio_is_the_highest_within_a_quarter(
    people: list[tuple[float, int, int, int, float | None]], gap: float
) -> None:
    p = Platform("hrrn")
    _fill(p, people)
    p.now += gap
    line = p.line()
    assert sorted(seq.number for seq in line) == sorted(seq.number for seq in p.people)
    ratios = [p.wait(seq) / p.work(seq) for seq in line]
    for position, ratio in enumerate(ratios):
        assert ratio >= 0.799 * max(ratios[position:])


def test_what_is_cached_meanwhile_moves_a_request_forward() -> None:
    """A burst with one long beginning: once it is cached, the rest of the burst has become short."""
    p = Platform("sjf", Rules(age_cap=1000.0))
    long, short = p.add(1000), p.add(100)
    assert p.line() == [short, long]
    p.cached[long.number] = 990
    p.now = 1.0
    assert p.line() == [long, short]


def test_who_was_put_back_stands_first_in_its_class() -> None:
    for name in ORDERS:
        p = Platform(f"priority:{name}")
        p.add(2, priority=0)
        again = p.add(40, priority=0)
        urgent = p.add(4, priority=-1)
        p.remove(again)
        again.preemptions = 1
        p.room.add(again, p.now)
        p.people.append(again)
        assert p.line()[:2] == [urgent, again], name


def test_a_class_waits_behind_newcomers_of_a_better_one_for_so_many_promotions() -> None:
    """k classes are k * promote_after seconds, and not a moment more."""
    for name in ("fcfs", "sjf"):
        p = Platform(f"priority:{name}", Rules(promote_after=5.0, age_cap=1000.0))
        patient = p.add(8, priority=3)
        for moment in (4.9, 9.9, 14.9):
            p.now = moment
            newcomer = p.add(8, priority=0)
            assert p.line()[0] is newcomer, name
            p.remove(newcomer)
        p.now = 15.0
        p.add(8, priority=0)
        assert p.line()[0] is patient, name


def test_a_look_at_thousands_scores_only_whom_it_takes() -> None:
    for policy, most in (("fcfs", 0), ("sjf", 0), ("priority:sjf", 0), ("prefix", 400), ("hrrn", 100), ("fair", 400)):
        p = Platform(policy)
        random = Random(5)
        for _ in range(3000):
            p.add(random.randint(1, 30), tenant=f"t{random.randrange(20)}")
        p.looked_up = 0
        line = p.room.line(p.now)
        for _ in range(8):
            next(line)
        assert p.looked_up <= most, policy


# Fairness


def _serve_tenants(world: World, lengths: dict[str, tuple[int, int]], steps: int) -> dict[str, list[float]]:
    """Keep both tenants backlogged with requests of (prompt, answer) tokens. Each tenant's service over its weight,
    after each step, counted from the outside."""
    weights = world.rules.weights
    got: dict[str, list[float]] = {tenant: [0.0] for tenant in lengths}
    owner: dict[int, str] = {}
    aboard: set[int] = set()
    rids = count(1)
    for _ in range(steps):
        for tenant, (prompt, answer) in lengths.items():
            while sum(seq.request.tenant == tenant for seq in world.scheduler.waiting) <= world.slots:
                rid = next(rids)
                owner[rid] = tenant
                world.submit(request(rid, prompt, answer, tenant=tenant, salt=str(rid)))
        before, planned = {rid: len(tokens) for rid, tokens in world.output.items()}, len(world.plans)
        world.step()
        gained = dict.fromkeys(lengths, 0.0)
        for plan in world.plans[planned:]:
            for admit in plan.admit:
                if admit.rid not in aboard:  # else it was put back meanwhile, and has paid
                    aboard.add(admit.rid)
                    gained[owner[admit.rid]] += len(admit.tokens) - admit.computed
        for rid, output in world.output.items():
            gained[owner[rid]] += 2 * (len(output) - before[rid])
        for tenant, virtual in gained.items():
            got[tenant].append(got[tenant][-1] + virtual / weights.get(tenant, 1.0))
    return got


@settings(max_examples=25)
@given(
    a=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    b=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    quantum=st.sampled_from([0.0, 50.0]),
    weight=st.sampled_from([1.0, 3.0]),
)
def test_two_backlogged_tenants_get_their_shares(
    a: tuple[int, int], b: tuple[int, int], quantum: float, weight: float
) -> None:
    """The published bound, at every pair of moments: the difference of their gains is never larger."""
    world = World(
        num_blocks=30, slots=4, max_step_tokens=32, policy="fair", rules=Rules(quantum=quantum, weights={"b": weight})
    )
    got = _serve_tenants(world, {"a": a, "b": b}, 250)
    gaps = [x - y for x, y in zip(got["a"], got["b"], strict=True)]
    pool = world.num_blocks * world.block_size
    assert max(gaps) - min(gaps) <= 2 * max(a[0], b[0], 2 * pool) + quantum
    assert min(got["a"][-1], got["b"][-1]) > 0


def test_shares_follow_the_weights() -> None:
    rules = Rules(quantum=0.0, weights={"b": 3.0})
    world = World(num_blocks=60, slots=4, max_step_tokens=32, policy="fair", rules=rules)
    got = _serve_tenants(world, {"a": (30, 10), "b": (6, 12)}, 1500)
    assert got["b"][-1] == pytest.approx(got["a"][-1], rel=0.05)


def test_nobody_saves_up_credit_and_nobody_pays_for_having_been_alone() -> None:
    world = World(num_blocks=60, slots=2, max_step_tokens=32, policy="fair", rules=Rules(quantum=0.0))
    for rid in range(1, 61):
        world.submit(request(rid, 20, 10, tenant="a", salt=str(rid)))
    for _ in range(250):
        world.step()
    done = len(world.plans)
    for rid in range(61, 91):
        world.submit(request(rid, 20, 10, tenant="b", salt=str(rid)))
    world.finish_all()
    boarded = [world.requests[a.rid].tenant for plan in world.plans[done:] for a in plan.admit][:10]
    assert {boarded.count("a"), boarded.count("b")} <= {4, 5, 6}, boarded


def test_who_was_alone_with_free_seats_owes_nothing_either() -> None:
    world = World(num_blocks=60, slots=2, max_step_tokens=32, policy="fair", rules=Rules(quantum=0.0))
    for rid in range(1, 101):
        world.submit(request(rid, 20, 10, tenant="a", salt=str(rid)))
        for _ in range(6):
            world.step()
    done = len(world.plans)
    for rid in range(101, 121):
        world.submit(request(rid, 20, 10, tenant="ba"[rid % 2], salt=str(rid)))
    world.finish_all()
    boarded = [world.requests[a.rid].tenant for plan in world.plans[done:] for a in plan.admit][:10]
    assert {boarded.count("a"), boarded.count("b")} <= {4, 5, 6}, boarded


def test_a_newcomer_does_not_queue_behind_a_flood_within_the_quantum() -> None:
    p = Platform("fair", Rules(quantum=1e9))
    for _ in range(20):
        p.add(20, tenant="flood")
    first = p.line()[0]
    p.room.remove(first)
    p.room.order.boards(first, p.now)
    newcomer = p.add(20, tenant="new")
    first.tokens.append(1)  # the flood gets another token
    p.room.order.service("flood")
    assert p.line()[0] is newcomer


def test_within_a_quantum_the_cached_prefix_boards_first() -> None:
    for quantum, expected in ((1000.0, [3, 1, 2]), (0.0, [1, 2, 3])):
        p = Platform("fair", Rules(quantum=quantum))
        p.room.order.boards(Sequence(request(99, 80, tenant="b"), 99, 0.0, 1 << 62), 0.0)
        for tenant, cached in (("a", 0), ("a", 0), ("b", 16)):
            p.add(20, cached, tenant=tenant)
        assert [seq.number for seq in p.line()] == expected


# Deadlines


def _overloaded(
    policy: str, *, load: float, wanted: float = 0.5, requests: int = 300
) -> tuple[World, int, list[OverloadedError]]:
    """Requests at `load` times what two seats can serve. The world, how many were in time, and the refusals."""
    world = World(num_blocks=200, slots=2, max_step_tokens=32, policy=policy, depth=1)
    random, refused = Random(3), list[OverloadedError]()
    each = 0.07 / load  # seconds between arrivals; two seats finish a request every 0.07 s
    due = 0.0
    for rid in range(1, requests + 1):
        due += random.expovariate(1 / each)
        while world.clock.now() < due:
            if not world.step():
                world.clock.advance(due - world.clock.now())
        try:
            world.submit(request(rid, 16, 12, ttft_deadline_s=wanted, salt=str(rid)))
        except OverloadedError as error:
            refused.append(error)
    world.finish_all()
    world.check_home()
    in_time = sum(event.usage.first_token_s <= wanted for event in world.final.values())  # type: ignore[operator, union-attr]
    return world, in_time, refused


def test_what_cannot_be_met_is_refused_early_rather_than_missed() -> None:
    _, met_fcfs, _ = _overloaded("fcfs", load=1.5)
    world, met, refused = _overloaded("deadline", load=1.5)
    accepted = len(world.requests)
    assert accepted + len(refused) == 300
    assert all(error.retry_after and "requests board before" in error.message for error in refused)
    assert met >= 0.95 * accepted
    assert met >= 5 * met_fcfs


def test_nobody_is_refused_while_all_can_be_met() -> None:
    world, met, refused = _overloaded("deadline", load=0.5)
    assert not refused
    assert met == len(world.requests) == 300


def test_a_prompt_that_takes_longer_than_it_has_is_refused_with_the_numbers() -> None:
    world = World(num_blocks=200, max_step_tokens=16, policy="deadline")
    world.submit(request(1, 80, 2))
    world.finish_all()
    with pytest.raises(DeadlineError, match="64 prompt tokens are not cached and take at least 0"):
        world.submit(request(2, 64, 2, ttft_deadline_s=0.05))
    world.submit(request(3, 64, 2, ttft_deadline_s=5.0))
    world.submit(request(4, 64, 2))
    world.finish_all()
    assert {rid for rid, event in world.final.items() if event.finish is FinishReason.LENGTH} == {1, 3, 4}


def test_who_is_late_waits_behind_who_can_be_in_time_but_not_for_ever() -> None:
    p = Platform("deadline", Rules(promote_after=5.0))
    late = p.add(8, ttft_deadline_s=1.0)
    p.now = 1.0
    assert p.line() == [late]
    for moment in range(2, 50, 4):
        p.now = float(moment)
        newcomer = p.add(8, ttft_deadline_s=3.0)
        assert p.line()[0] is newcomer
        p.remove(newcomer)
    p.now = 51.0  # ten classes of five seconds after its deadline
    p.add(8, ttft_deadline_s=3.0)
    assert p.line()[0] is late


# All of them


@pytest.mark.parametrize("policy", POLICIES)
def test_every_order_serves_everybody_under_cancels_and_preemption(policy: str) -> None:
    random = Random(11)
    world = World(num_blocks=26, slots=6, depth=2, policy=policy)
    for rid in range(1, 61):
        world.submit(_with_people(random, rid, world))
        if random.random() < 0.2:
            world.cancel(random.randint(1, rid))
        for _ in range(random.randrange(4)):
            world.step()
            world.check()
    world.finish_all()
    world.check_home()
    world.check_texts()
    assert world.scheduler.counters.preemptions > 0


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), switches=st.lists(st.sampled_from(POLICIES), min_size=2, max_size=8))
def test_a_switch_keeps_everybody(seed: int, switches: list[str]) -> None:
    random = Random(seed)
    world = World(num_blocks=30, slots=4, depth=2)
    rids = count(1)
    for policy in switches:
        for _ in range(random.randrange(8)):
            world.submit(_with_people(random, next(rids), world))
        for _ in range(random.randrange(6)):
            world.step()
        before = {seq.rid for seq in world.scheduler.waiting}
        world.scheduler.reorder(make_order(policy, RULES), world.clock.now())
        assert {seq.rid for seq in world.scheduler.waiting} == before
        assert {why.rid for why in world.scheduler.why(world.clock.now())} == before
        world.check()
    world.finish_all()
    world.check_home()
    world.check_texts()


def _with_people(random: Random, rid: int, world: World) -> GenerateRequest:
    """A request with a tenant, and sometimes a deadline that is far away."""
    made = random_request(random, rid, world)
    tenant, wanted = random.choice(["", "a", "b"]), random.choice([None, 1000.0])
    return GenerateRequest(
        rid=rid, tokens=made.tokens, sampling=made.sampling, eos_ids=made.eos_ids, priority=made.priority,
        salt=made.salt, tenant=tenant, ttft_deadline_s=wanted,
    )  # fmt: skip


def test_an_unknown_policy_is_refused_by_name() -> None:
    for wrong in ("lifo", "fair:sjf", "priority:", "priority:priority", ""):
        with pytest.raises(ConfigError, match="There is no scheduling policy"):
            make_order(wrong)
