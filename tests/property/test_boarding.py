"""Who boards when and with how much: shared beginnings are computed once, and prefill leaves streams their pace."""

from __future__ import annotations

import pytest
from harness import World, request

from ropeway.contract import Row, StepPlan
from ropeway.scheduler import TargetLatency


def _burst(world: World, followers: int, shared: int, own: int) -> int:
    """A burst of requests with a common beginning. Returns the prompt tokens that were computed."""
    start = [i % 40 for i in range(shared)]
    for rid in range(followers):
        world.submit(request(rid, start + [rid % 50] * own))
    world.finish_all()
    world.check_home()
    world.check_texts()
    return sum(row.count for plan in world.plans for row in plan.rows) - 3 * followers


@pytest.mark.parametrize("step", [16, 64, 512])
def test_a_burst_computes_its_common_beginning_once(step: int) -> None:
    world = World(num_blocks=400, slots=32, max_step_tokens=step, max_model_len=128)
    assert _burst(world, followers=24, shared=64, own=6) == 64 + 24 * 6


def test_a_burst_without_a_cache_computes_everything() -> None:
    world = World(num_blocks=400, slots=32, max_step_tokens=64, max_model_len=128, prefix_caching=False)
    assert _burst(world, followers=4, shared=64, own=6) == 4 * 70


def test_others_pass_those_who_wait_for_a_shared_beginning() -> None:
    world = World(num_blocks=400, slots=8, max_step_tokens=48, max_model_len=128)
    start = list(range(40))
    for rid in (1, 2, 3):
        world.submit(request(rid, [*start, rid]))
    world.submit(request(4, [9, 9, 9]))
    world.step()
    assert [row.rid for row in world.plans[0].rows] == [1, 4]
    assert world.scheduler.why(0.0)[0].reason == "it boards with the next step"
    world.step()
    assert {row.rid for row in world.plans[1].rows} == {1, 2, 3, 4}
    world.finish_all()
    world.check_texts()


def test_the_reason_names_who_computes_the_shared_beginning() -> None:
    world = World(num_blocks=400, slots=8, max_step_tokens=16, max_model_len=128)
    start = list(range(40))
    for rid in (1, 2, 3):
        world.submit(request(rid, [*start, rid]))
    world.step()
    for why in world.scheduler.why(0.0):
        assert why.holder == "shared-prefix"
        assert "request 1 computes" in why.reason


def test_followers_go_on_alone_when_the_leader_leaves() -> None:
    world = World(num_blocks=400, slots=8, max_step_tokens=16, max_model_len=128)
    start = list(range(40))
    for rid in (1, 2, 3):
        world.submit(request(rid, [*start, rid]))
    world.step()
    world.cancel(1)
    world.step()
    assert [row.rid for row in world.plans[-1].rows] == [2]
    world.finish_all()
    world.check_home()
    world.check_texts()


class _Waiting:
    """A running sequence as a budget sees it."""

    def __init__(self, want: int) -> None:
        self.known, self.computed = 100 + want, 100


def _plan(*counts: int) -> StepPlan:
    return StepPlan(1, [], [], [Row(i, 1, i, 0, count, True, []) for i, count in enumerate(counts)], [])


def _taught(budget: TargetLatency, fixed: float, each: float, steps: int = 60) -> TargetLatency:
    for step in range(steps):
        plan = _plan(*[1] * (step % 5), 1 + 37 * step % 200)
        budget.learn(plan, fixed + each * plan.num_tokens)
    return budget


def test_costs_are_learned_and_learned_anew() -> None:
    budget = _taught(TargetLatency(512, 16), 0.02, 0.003)
    assert budget.fixed == pytest.approx(0.02)
    assert budget.each == pytest.approx(0.003)
    _taught(budget, 0.01, 0.001, steps=400)
    assert budget.fixed == pytest.approx(0.01, rel=0.01)
    assert budget.each == pytest.approx(0.001, rel=0.01)


def test_steps_that_are_all_alike_do_not_unlearn_the_costs() -> None:
    budget = _taught(TargetLatency(512, 16), 0.02, 0.003)
    for number in range(2000):
        budget.learn(_plan(*[1] * 8), 0.044 * (0.9 if number % 2 else 1.1))
    assert budget.each == pytest.approx(0.003, rel=0.01)
    assert budget.fixed + 8 * budget.each == pytest.approx(0.044, rel=0.02)


@pytest.mark.parametrize("pause", [None, 0.1, 0.3])
def test_prefill_beside_streams_keeps_to_the_pause(pause: float | None) -> None:
    budget = _taught(TargetLatency(512, 16, pause), 0.02, 0.001)
    running = [_Waiting(1)] * 10 + [_Waiting(300)]
    tokens = budget.tokens(running)  # type: ignore[arg-type]
    expected = pause or max(2 * 0.03, 4 * 0.02)
    assert 0.02 + 0.001 * tokens == pytest.approx(expected, abs=0.0011)


def test_prefill_goes_on_however_short_the_pause() -> None:
    budget = _taught(TargetLatency(512, 16, 0.001), 0.02, 0.001)
    assert budget.tokens([_Waiting(1)] * 10 + [_Waiting(300)]) == 26  # type: ignore[list-item]


def test_nobody_who_streams_means_long_steps() -> None:
    budget = _taught(TargetLatency(4096, 16), 0.02, 0.001)
    assert abs(budget.tokens([_Waiting(300)]) - 300) <= 1  # type: ignore[list-item]


def test_a_budget_that_knows_nothing_yet_is_the_largest() -> None:
    assert TargetLatency(512, 16).tokens([]) == 512
