"""An endless backlog beside simulated traffic: what it costs the others, and what it yields."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from simkit import small_config, small_profile

from ropeway.cli.main import main
from ropeway.contract import Urgency
from ropeway.sim.cost import CostModel
from ropeway.sim.report import Targets, report
from ropeway.sim.simulate import capacity, simulate
from ropeway.sim.traces import read_trace
from ropeway.sim.workload import Arrival, Traffic, endless, generate, scale

TARGETS = Targets(1.0, 0.1)


def chats(count: int, seed: int = 0) -> list[Arrival]:
    return scale(generate(Traffic(workload="sharegpt", count=count, rate=1.0, seed=seed)), length=0.4)


def test_a_backlog_ends_with_the_traffic_and_is_told_apart() -> None:
    arrivals = scale(chats(30), rate=2.0)
    run = simulate(arrivals, small_profile(), small_config(), backlog=endless(chats(10, 1)), replicas=2)
    assert [o.arrival for o in run.outcomes] == arrivals
    assert all(o.ok for o in run.outcomes)
    assert {o.arrival.urgency for o in run.backlog} == {Urgency.LOW}
    found = report(run, TARGETS)
    assert (found.requests, found.finished) == (30, 30)
    assert found.backlog == sum(o.ok for o in run.backlog) > 30
    alone = report(simulate(arrivals, small_profile(), small_config(), replicas=2), TARGETS)
    assert alone.backlog == 0
    assert found.computed_rate > 2 * alone.computed_rate
    # Each gap is one of the traffic's: every token of an answer but the first has one before it.
    assert sum(run.gap_counts) == sum(o.output_len - 1 for o in run.outcomes)


def test_what_repeats_shares_nothing_with_what_came_before() -> None:
    work = chats(5)
    found = list(islice(endless(work), 15))
    firsts = [a.prompt[0][0] for a in (*work, *found)]
    assert len(set(firsts)) == 20
    assert [a.output_len for a in found] == [a.output_len for a in work] * 3


def test_idle_time_is_used_and_people_hardly_notice() -> None:
    """On a machine where a few rows more cost little, as where each step reads the weights."""
    profile = small_profile(cost=CostModel(base=0.01, per_token=0.00005, bends=((48, 0.0004),)), kv_tokens=1 << 16)
    config = small_config(max_num_seqs=48, max_num_batched_tokens=256)
    people, work = chats(400), chats(200, 1)
    arrivals = scale(people, rate=0.5 * capacity(people, profile, config))
    eager = dataclasses.replace(config, step_budget_ms=0.0)
    each = sum(a.prompt_len + a.output_len - 1 for a in work) / len(work)
    offline = each * capacity(work, profile, eager)
    alone, beside = (simulate(arrivals, profile, config, backlog=b) for b in ((), endless(work)))

    def p99(run: object) -> tuple[float, float]:
        gaps = np.repeat(np.asarray(run.gaps), np.asarray(run.gap_counts))  # type: ignore[attr-defined]
        firsts = [o.first for o in run.outcomes[20:]]  # type: ignore[attr-defined]
        return float(np.percentile(firsts, 99)), float(np.percentile(gaps[len(gaps) // 20 :], 99))

    ratios = [after / before for after, before in zip(p99(beside), p99(alone), strict=True)]
    shares = [run.computed / run.seconds / offline for run in (alone, beside)]
    assert max(ratios) <= 1.25, (ratios, shares)
    assert shares[0] < 0.6, (ratios, shares)
    assert shares[1] >= 0.9, (ratios, shares)
    unbounded = simulate(arrivals, profile, dataclasses.replace(config, background_gap_ms=0.0), backlog=endless(work))
    assert p99(unbounded)[0] > p99(beside)[0]


def test_a_trace_may_name_the_urgency(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at": 0, "prompt_tokens": 3, "output_tokens": 2, "urgency": "low"}\n'
        '{"at": 1, "prompt_tokens": 3, "output_tokens": 2}\n'
    )
    assert [a.request(n).urgency for n, a in enumerate(read_trace(path, None))] == [Urgency.LOW, Urgency.HIGH]


def test_the_command_says_what_was_served_beside(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sim", "--num-requests", "40", "--load", "0.3", "--backlog"])
    assert "requests of the backlog were served" in capsys.readouterr().out
