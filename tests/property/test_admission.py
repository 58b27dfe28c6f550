"""Who is let on board when memory is short: few are put back, nobody is passed for ever, and nothing idles."""

from __future__ import annotations

from random import Random

import pytest
from harness import World, random_request
from hypothesis import given
from hypothesis import strategies as st

from ropeway.contract import GenerateRequest, SamplingParams, StepPlan
from ropeway.scheduler import Forecast, MostToGo, Newest
from ropeway.scheduler.peak import Peak
from ropeway.scheduler.sequence import Sequence, State


def _request(rid: int, prompt: int, answer: int, *, priority: int = 0) -> GenerateRequest:
    return GenerateRequest(
        rid=rid, tokens=[(rid * 7 + i) % 50 for i in range(prompt)], priority=priority,
        sampling=SamplingParams(max_tokens=answer, seed=rid),
    )  # fmt: skip


def _overload(foresight: bool, seed: int = 2, requests: int = 1500) -> tuple[World, float]:
    """Always somebody waiting; answers take 60 tokens and then end by chance, after 40 more on average; they
    may take 800. Returns the mean
    share of blocks held, after a warm-up."""
    world = World(
        num_blocks=1800, block_size=16, slots=512, max_model_len=1024, max_step_tokens=512, vocab_size=100,
        foresight=foresight,
    )  # fmt: skip
    random, rid, held = Random(seed), 0, []
    while len(world.final) < requests:
        while len(world.scheduler.waiting) < 16:
            rid += 1
            prompt = [random.randrange(100) for _ in range(random.randint(40, 120))]
            sampling = SamplingParams(max_tokens=800, min_tokens=60, seed=rid)
            world.submit(GenerateRequest(rid=rid, tokens=prompt, sampling=sampling, eos_ids=(7, 8)))
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
    world.submit(_request(1, 40, 60))
    world.step()
    world.submit(_request(2, 200, 8))  # needs nearly the whole pool
    long, before = world.scheduler._sequences[2], 0
    for rid in range(3, 200):
        world.submit(_request(rid, 4, 4))
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


# What is expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12), st.integers(0, 40), st.integers(0, 40))
def test_the_peak_is_what_playing_it_through_finds(crowd: list[tuple[int, int]], growth: int, held: int) -> None:
    everybody = [*crowd, (growth, held)]
    played = max(
        sum(holds + step for grows, holds in everybody if grows >= step)
        for step in range(1 + max(grows for grows, _ in everybody))
    )
    assert Peak(crowd).plus(growth, held) == played


def _sequence(rid: int = 1, output: int = 0, *, most: int = 1000, priority: int = 0) -> Sequence:
    seq = Sequence(_request(rid, 10, most, priority=priority), rid, 0.0, 1 << 62)
    seq.tokens += [1] * output
    return seq


def _taught(lengths: list[int]) -> Forecast:
    forecast = Forecast()
    for length in lengths:
        forecast.ended(_sequence(output=length))
    return forecast


def test_an_answer_is_expected_to_end_like_those_that_became_longer() -> None:
    forecast = _taught([10, 20, 30, 40, 400])
    assert forecast.to_go(_sequence()) == 30
    assert forecast.to_go(_sequence(output=30)) == 400 - 30
    assert forecast.to_go(_sequence(output=10), 0.0) == 10
    assert forecast.to_go(_sequence(output=500)) == 500, "longer than all: as much again"
    assert forecast.to_go(_sequence(output=15, most=18)) == 3, "never beyond the request's own bound"
    assert Forecast().to_go(_sequence()) == Forecast.GUESS


def test_draws_of_many_are_like_what_has_been_seen() -> None:
    forecast = _taught(list(range(1, 101)))
    drawn = [forecast.draw(_sequence(rid)) for rid in range(1, 51)]
    assert sum(drawn) / len(drawn) == pytest.approx(50.5, rel=0.05)
    assert min(drawn) < 10
    assert max(drawn) > 90


def test_old_answers_are_forgotten() -> None:
    forecast = _taught([10] * 5 + [50] * Forecast.WINDOW)
    assert forecast.to_go(_sequence(), 0.0) == 50


def test_who_still_runs_counts_until_enough_have_ended() -> None:
    forecast = _taught([5] * 10)
    riding = [_sequence(rid, output=100) for rid in range(1, 31)]
    assert forecast.to_go(_sequence()) == 5
    forecast.survey(riding)
    assert forecast.to_go(_sequence()) >= 200
    full = _taught([5] * Forecast.WINDOW)
    full.survey(riding)
    assert full.to_go(_sequence()) == 5


def test_the_reserve_follows_preemptions_within_bounds() -> None:
    forecast = Forecast()
    for _ in range(1000):
        forecast.preempted()
    assert forecast.reserve == Forecast.MOST
    for _ in range(5_000):
        forecast.ended(_sequence())
    assert forecast.reserve == 0
    rate = Forecast.PREEMPTIONS
    for number in range(6_000):
        forecast.ended(_sequence())
        if number % int(1 / rate) == 0:
            forecast.preempted()
    assert forecast.reserve == pytest.approx(Forecast.STEP, abs=Forecast.STEP), "in balance at the rate it allows"


# Who is put back


def test_the_least_urgent_with_most_to_go_is_put_back() -> None:
    forecast = _taught([100])
    riding = [
        _sequence(1, 10),
        _sequence(2, 5, priority=1),
        _sequence(3, 40, priority=1),
        _sequence(4, 40, priority=1),
        _sequence(5, 0),
    ]
    assert MostToGo().pick(riding, forecast).rid == 2
    assert MostToGo().pick(riding[2:], forecast).rid == 4, "of two alike the one admitted last"
    assert MostToGo().pick([riding[0], riding[4]], forecast).rid == 5
    assert Newest().pick(riding, forecast).rid == 5


def test_who_is_nearly_done_is_spared_unless_all_are() -> None:
    forecast = _taught([100])
    done, doing = _sequence(1, 85, priority=3), _sequence(2, 70)
    assert MostToGo().pick([done, doing], forecast) is doing
    assert MostToGo().pick([done], forecast) is done
