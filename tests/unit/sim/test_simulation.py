"""The simulation itself: nobody is lost, the same twice, and the same as the engine with any other executor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simkit import small_config, small_profile

from ropeway.contract import FinishReason, Submit
from ropeway.engine.engine import Engine
from ropeway.errors import ConfigError
from ropeway.sim import FakeExecutor, VirtualClock
from ropeway.sim.profile import Serving
from ropeway.sim.report import Report, Targets, _spread, jain, report, table
from ropeway.sim.simulate import Outcome, Run, capacity, simulate
from ropeway.sim.workload import Arrival, Traffic, alone, generate, scale

TARGETS = Targets(1.0, 0.1)


def traffic(count: int = 60, rate: float = 4.0, **more: object) -> list[Arrival]:
    made = generate(Traffic(workload="burstgpt", count=count, rate=rate, **more))  # type: ignore[arg-type]
    return scale(made, length=0.1)


def long_answers(count: int, *, foreseen: bool = True) -> list[Arrival]:
    """Requests that grow much after they have boarded; how much, the scheduler may know or not."""
    made = generate(Traffic(workload="poisson", count=count, rate=20.0, input_len=10, output_len=100))
    if foreseen:
        return made
    # First short answers, so that nobody expects long ones.
    return [dataclasses.replace(a, max_tokens=300, output_len=(5, 200)[n > count // 2]) for n, a in enumerate(made)]


def test_an_engine_knows_from_the_start_what_steps_cost() -> None:
    """As one that has served before: whoever streams is not held up by the first crowd."""
    crowd = [alone(0.005, 400, 4, number) for number in range(1, 20)]
    run = simulate([alone(0.0, 1, 100, 0), *crowd], small_profile(), small_config(max_num_batched_tokens=512))
    assert max(run.gaps) < 0.1


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    seats=st.integers(1, 12),
    blocks=st.integers(64, 200),
    replicas=st.integers(1, 3),
    batching=st.sampled_from(["continuous", "static"]),
    queue=st.integers(1, 60),
    deadline=st.one_of(st.none(), st.floats(0.1, 5.0)),
)
def test_every_request_ends_exactly_once(
    seed: int, seats: int, blocks: int, replicas: int, batching: str, queue: int, deadline: float | None
) -> None:
    arrivals = [dataclasses.replace(a, deadline_s=deadline) for a in traffic(40, 20.0, seed=seed)]
    config = small_config(max_num_seqs=seats, num_kv_blocks=blocks, batching=batching, max_queue=queue)
    run = simulate(arrivals, small_profile(), config, replicas=replicas)
    found = report(run, TARGETS)
    assert found.finished + found.rejected + found.timed_out == len(arrivals)
    for outcome in run.outcomes:
        assert outcome.finish is not None
        if outcome.ok:
            assert outcome.output_len == min(outcome.arrival.output_len, 1024 - outcome.arrival.prompt_len)
            assert outcome.first is not None
            assert outcome.last is not None
            assert 0 < outcome.first <= outcome.last
    # Each token but the first of an answer has one gap before it.
    assert sum(run.gap_counts) >= sum(o.output_len - 1 for o in run.outcomes if o.ok)
    assert found.wasted >= 0


def test_the_same_twice() -> None:
    def once() -> object:
        return report(simulate(traffic(), small_profile(), small_config(), replicas=2), TARGETS)

    assert once() == once()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_engine_decides_as_it_would_with_an_executor_that_computes(policy: str) -> None:
    """Times of all events are those that the engine has over the fake executor, which computes texts."""
    profile, config = small_profile(), small_config(scheduling_policy=policy, num_kv_blocks=24)
    arrivals = long_answers(30)
    run = simulate(arrivals, profile, config)

    clock = VirtualClock()
    executor = FakeExecutor(profile.executor_info(config), cost=profile.cost, clock=clock)
    engine = Engine(executor, config, clock=clock, secret=b"other")
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    coming = list(enumerate(arrivals))
    while coming or engine.busy:
        while coming and coming[0][1].at <= clock.now():
            rid, arrival = coming.pop(0)
            engine.submit([Submit(arrival.request(rid))])
        if engine.busy:
            for event in engine.step().events:
                if event.tokens:
                    first.setdefault(event.rid, clock.now())
                    last[event.rid] = clock.now()
        else:
            clock.advance_to(coming[0][1].at)
    for rid, outcome in enumerate(run.outcomes):
        assert outcome.first == pytest.approx(first[rid] - outcome.arrival.at)
        assert outcome.last == pytest.approx(last[rid] - outcome.arrival.at)


def test_a_lone_request_takes_what_the_profile_says() -> None:
    serving = Serving(
        request=0.5, prompt_token=0.001, arrive=0.25, wake=0.125, step=0.002, row=0.003, deliver=0.004, deliver_row=1e-4
    )
    run = simulate([alone(1.0, 10, 3, 0)], small_profile(serving=serving), small_config())
    (outcome,) = run.outcomes
    way = 0.5 + 10 * 0.001 + 0.25 + 0.125
    assert outcome.first == pytest.approx(way + 0.01 + 10 * 0.001 + 0.004 + 1e-4)
    assert outcome.last == pytest.approx(outcome.first + 2 * (0.01 + 0.001 + 0.002 + 0.003))
    assert run.computed == 12
    assert run.steps == 3


def test_who_joins_makes_the_others_wait_and_jitter_has_its_mean() -> None:
    serving = Serving(join=0.05, jitter=((-0.002, 0.008), (0.1,)))
    run = simulate([alone(0.0, 1, 40, 0), alone(0.1, 10, 1, 1)], small_profile(serving=serving), small_config())
    (longer,) = (gap for gap in run.gaps if gap > 0.05)
    assert longer == pytest.approx(0.05 + 0.01 + 0.001 * 11 + 0.1), "it joins, and its prompt is read"
    others = [gap for gap in run.gaps if gap < 0.05]
    assert len(others) == 38
    assert np.mean(others) == pytest.approx(0.011 + 0.003, abs=0.001)
    assert {round(gap, 6) for gap in others} == {0.009, 0.019}


def test_what_is_late_now_and_then_is_so_in_the_mean() -> None:
    spread = (0.0, 0.002, 0.007)
    arrivals = [alone(0.05 * n, 4, 2, n) for n in range(60)]
    late, punctual = (
        simulate(arrivals, small_profile(serving=Serving(deliver_jitter=parts)), small_config())
        for parts in (spread, ())
    )
    more = [one.first - other.first for one, other in zip(late.outcomes, punctual.outcomes, strict=True)]  # type: ignore[operator]
    assert {round(seconds, 6) for seconds in more} == set(spread)
    assert np.mean(more) == pytest.approx(0.003, abs=5e-4)
    assert all(one.first <= one.last for one in late.outcomes)  # type: ignore[operator]
    assert late.gaps == punctual.gaps


def test_clients_are_told_in_order() -> None:
    """A large step's tokens take longer on their way out than a small one's, but are not overtaken by them."""
    arrivals = [alone(0.0, 4, 2 + (n == 0), n) for n in range(8)]
    run = simulate(arrivals, small_profile(serving=Serving(deliver_row=0.1)), small_config())
    assert run.outcomes[0].last == run.outcomes[1].last
    assert sum(run.gap_counts) == 8, "the last token of the longest comes together with the one before"
    assert all(gap > 0 for gap in run.gaps)


def test_static_and_continuous_batching_are_equal_at_low_load() -> None:
    arrivals = generate(Traffic(workload="uniform", count=30, rate=0.5, input_len=20, output_len=10))
    found = [
        report(simulate(arrivals, small_profile(), small_config(batching=batching)), TARGETS)
        for batching in ("static", "continuous")
    ]
    assert found[0] == found[1]


def test_static_batching_is_worse_under_load() -> None:
    arrivals = traffic(80, 1000.0)
    static, continuous = (
        report(simulate(arrivals, small_profile(), small_config(batching=batching)), TARGETS)
        for batching in ("static", "continuous")
    )
    assert static.output_rate < 0.8 * continuous.output_rate
    assert static.ttft["p50"] > continuous.ttft["p50"]


def test_conversations_find_their_history_in_the_cache() -> None:
    arrivals = scale(generate(Traffic(workload="sessions", count=60, rate=0.05)), length=0.02)
    profile = small_profile(kv_tokens=65536, max_model_len=65536)
    hit = report(simulate(arrivals, profile, small_config()), TARGETS).hit_rate
    assert hit > 0.3
    assert report(simulate(arrivals, profile, small_config(enable_prefix_caching=False)), TARGETS).hit_rate == 0


def test_a_small_cache_wastes_work() -> None:
    small = small_config(num_kv_blocks=24, enable_prefix_caching=False)
    found = report(simulate(long_answers(40, foreseen=False), small_profile(), small), TARGETS)
    assert found.preemptions >= found.preempted > 0
    assert found.wasted > 0
    assert report(simulate(long_answers(40, foreseen=False), small_profile(), small_config()), TARGETS).wasted == 0


def test_an_answer_that_ends_by_itself_has_the_length_that_nobody_knew() -> None:
    run = simulate(long_answers(20, foreseen=False), small_profile(), small_config())
    assert all(o.finish is FinishReason.STOP and o.output_len == o.arrival.output_len for o in run.outcomes)


def test_blocks_that_move_to_a_host_tier_are_not_computed_again() -> None:
    profile = small_profile(copy_rates={"host": 64 * 16 / 0.001})  # a millisecond a block
    crowd = long_answers(40, foreseen=False)

    def found(**settings: object) -> Report:
        return report(simulate(crowd, profile, small_config(num_kv_blocks=24, kv_host_gib=0.01, **settings)), TARGETS)

    swap, recompute = found(preemption_mode="swap"), found(preemption_mode="recompute")
    assert swap.preemptions > 0
    assert swap.wasted < recompute.wasted
    with pytest.raises(ConfigError, match="how fast blocks move"):
        simulate(crowd, small_profile(), small_config(kv_host_gib=0.01))


def test_replicas_share_the_work() -> None:
    arrivals = traffic(80, 50.0)
    one, four, turns = (
        report(simulate(arrivals, small_profile(), small_config(), replicas=n, balance=balance), TARGETS)  # type: ignore[arg-type]
        for n, balance in ((1, "least-loaded"), (4, "least-loaded"), (4, "round-robin"))
    )
    assert four.ttft["p50"] < one.ttft["p50"] / 2
    assert four.ttft["mean"] <= turns.ttft["mean"]


def test_capacity_is_the_rate_at_which_queues_begin_to_grow() -> None:
    arrivals = traffic(300, 1.0)
    most = capacity(arrivals, small_profile(), small_config())
    below, above = (
        report(simulate(scale(arrivals, rate=load * most), small_profile(), small_config()), TARGETS)
        for load in (0.5, 2.0)
    )
    assert above.request_rate == pytest.approx(most, rel=0.25)
    assert below.ttft["p50"] < above.ttft["p50"] / 5


def test_refused_requests_count_against_goodput() -> None:
    found = report(simulate(traffic(40, 1000.0), small_profile(), small_config(max_queue=1)), Targets(1e9, 1e9))
    assert found.rejected > 0
    assert found.goodput == pytest.approx(found.finished / 40)


def test_the_table_has_a_line_for_each_run() -> None:
    found = report(simulate(traffic(5), small_profile(), small_config()), TARGETS)
    lines = table([("one", found), ("the other", found)]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def test_weighted_percentiles_are_those_of_the_repeated_values() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.random(50), rng.integers(1, 20, 50)
    spread = _spread(list(values), [int(n) for n in counts])
    repeated = np.repeat(values, counts)
    for p in (50, 90, 99):
        assert spread[f"p{p}"] == pytest.approx(np.percentile(repeated, p, method="inverted_cdf"))
    assert spread["mean"] == pytest.approx(repeated.mean())
    assert _spread([])["p99"] == 0


def test_jains_index() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == 1


def test_goodput_needs_both_targets() -> None:
    def outcome(first: float, last: float) -> Outcome:
        return Outcome(alone(0, 1, 11, 0), first, last, 11, finish=FinishReason.LENGTH)

    run = Run([outcome(0.5, 1.0), outcome(2.0, 2.1), outcome(0.5, 3.0)], seconds=3.0)
    assert report(run, TARGETS).goodput == pytest.approx(1 / 3)
