"""Who is let on board when memory is short: few are put back, nobody is passed for ever, and nothing idles."""

from __future__ import annotations

from random import Random

import pytest
from harness import World, random_request, request

from ropeway.contract import StepPlan
from ropeway.scheduler.sequence import State


def _overload(foresight: bool, seed: int = 2, requests: int = 1500) -> tuple[World, float]:
    """Always somebody waiting; answers take 60 tokens and then end by chance, after 40 more on average; they may
    take 800. Returns the mean share of blocks held, after a warm-up."""
    world = World(
        num_blocks=1800, block_size=16, slots=512, max_model_len=1024, max_step_tokens=512, vocab_size=100,
        foresight=foresight,
    )  # fmt: skip
    random, rid, held = Random(seed), 0, []
    while len(world.final) < requests:
        while len(world.scheduler.waiting) < 16:
            rid += 1
            prompt = [random.randrange(100) for _ in range(random.randint(40, 120))]
            world.submit(request(rid, prompt, 800, sampling={"min_tokens": 60}, eos_ids=(7, 8)))
        world.step()
        held.append(world.scheduler.pool.used / world.num_blocks)
    steady = held[len(held) // 6 :]
    return world, sum(steady) / len(steady)


def test_full_memory_and_yet_hardly_anybody_is_put_back() -> None:
    world, held = _overload(foresight=True)
    assert held > 0.95
    assert world.scheduler.counters.preemptions < 0.01 * len(world.final)


def test_without_foresight_many_would_be_put_back() -> None:
    world, _ = _overload(foresight=False, requests=600)
    assert world.scheduler.counters.preemptions > 0.05 * len(world.final)


@pytest.mark.parametrize("blind", [False, True])
def test_who_does_not_fit_is_passed_a_bounded_number_of_times(blind: bool) -> None:
    world = World(num_blocks=60, slots=32, max_step_tokens=64, max_model_len=240, foresight=not blind)
    world.submit(request(1, 40, 60))
    world.step()
    world.submit(request(2, 200, 8))  # needs nearly the whole pool
    long, before = world.scheduler.sequences[2], 0
    for rid in range(3, 200):
        world.submit(request(rid, 4, 4))
        world.step()
        if long.state is State.QUEUED:
            before += sum(1 for admit in world.plans[-1].admit if admit.epoch == 1)
            why = world.scheduler.why(world.clock.now(), [2])[0]
            assert why.holder == "kv-blocks" or why.reason == "it boards with the next step"
    assert before == 16
    assert long.state is not State.QUEUED
    world.finish_all()
    world.check_home()
    world.check_texts()


def _idles(world: World) -> bool:
    """Whether somebody of the line could still board, asked anew after a plan."""
    scheduler, limits = world.scheduler, world.scheduler._limits
    for looked, seq in enumerate(scheduler.waiting.line(world.clock.now())):
        scheduler._match(seq)
        count, holder = limits.cap(seq)
        seq.blocks, seq.computed = [], 0
        if count > 0:
            return True
        assert holder is not None
        if seq.passed >= holder.passes or looked >= 16:
            break
    return False


@pytest.mark.parametrize("shape", [{}, {"foresight": True}, {"prefix_caching": False}, {"chunked_prefill": False}])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nothing_idles_while_somebody_could_board(shape: dict[str, bool], policy: str) -> None:
    world = World(num_blocks=40, slots=6, max_step_tokens=64, policy=policy, **shape)  # type: ignore[arg-type]
    random, scheduler = Random(9), world.scheduler
    honest, watched = scheduler.plan, 0

    def plan(now: float) -> StepPlan | None:
        nonlocal watched
        paused = scheduler._last.calm == 0 and bool(scheduler.running)
        made = honest(now)
        if not paused and scheduler._last.calm:
            assert not _idles(world)
            watched += len(scheduler.waiting) > 0 and scheduler._limits.tokens.left > 0
        return made

    scheduler.plan = plan  # type: ignore[method-assign]
    for rid in range(1, 150):
        world.submit(random_request(random, rid, world, longest=64))
        world.step()
    world.finish_all()
    world.check_home()
    assert watched > 50


@pytest.mark.parametrize("foresight", [False, True])
def test_a_pause_follows_a_preemption_and_progress_never_stops(foresight: bool) -> None:
    world = World(num_blocks=26, slots=6, foresight=foresight)
    random, scheduler, pauses = Random(4), world.scheduler, 0
    for rid in range(1, 80):
        world.submit(random_request(random, rid, world, longest=64))
    while scheduler.busy:
        before = scheduler.counters.preemptions
        paused = scheduler._last.calm == 0 and bool(scheduler.running)
        world.step()
        if paused or scheduler.counters.preemptions > before:
            assert not world.plans[-1].admit
            pauses += paused
    world.check_texts()
    assert foresight or pauses > 5


@pytest.mark.parametrize("shape", [{"num_blocks": 26, "slots": 6}, {"num_blocks": 26, "slots": 12, "depth": 2}])
def test_foresight_keeps_text_and_bookkeeping_right_and_is_deterministic(shape: dict[str, int]) -> None:
    def run() -> World:
        world = World(**shape, foresight=True, policy="priority")  # type: ignore[arg-type]
        random = Random(3)
        for rid in range(1, 120):
            world.submit(random_request(random, rid, world, longest=64))
            if random.random() < 0.1:
                world.cancel(random.randint(1, rid))
            world.step()
            world.check()
        world.finish_all()
        world.check_home()
        world.check_texts()
        return world

    assert run().plans == run().plans
