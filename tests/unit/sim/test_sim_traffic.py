"""Where simulated requests come from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from simkit import small_config, small_profile

from ropeway.contract import GenerateRequest, SamplingParams, Submit
from ropeway.errors import ConfigError
from ropeway.recorder.recorder import RecordedEngine
from ropeway.sim import FakeExecutor, VirtualClock
from ropeway.sim.traces import read_trace
from ropeway.sim.workload import WORKLOADS, Traffic, alone, generate, merge, scale


@pytest.mark.parametrize("workload", WORKLOADS)
def test_synthetic_traffic_has_its_rate_and_comes_from_its_seed_alone(workload: str) -> None:
    traffic = Traffic(workload=workload, count=400, rate=5.0, seed=3)
    arrivals = generate(traffic)
    assert arrivals == generate(traffic)
    assert arrivals != generate(Traffic(workload=workload, count=400, rate=5.0, seed=4)) or workload == "uniform"
    assert len(arrivals) == 400
    assert arrivals[0].at == 0
    assert arrivals[-1].at == pytest.approx(399 / 5.0)
    assert all(a.at <= b.at and a.prompt_len > 0 and a.output_len > 0 for a, b in itertools.pairwise(arrivals))


@pytest.mark.parametrize(
    ("workload", "prompt", "output"), [("azure-conv", 757, 129), ("azure-code", 1469, 16), ("burstgpt", 218, 26)]
)
def test_lengths_have_the_published_medians(workload: str, prompt: float, output: float) -> None:
    arrivals = generate(Traffic(workload=workload, count=4000))
    assert median(a.prompt_len for a in arrivals) == pytest.approx(prompt, rel=0.1)
    assert median(a.output_len for a in arrivals) == pytest.approx(output, rel=0.15)


def test_gaps_of_bursty_traffic_vary_more_than_a_poisson_process() -> None:
    def variation(workload: str) -> float:
        times = [a.at for a in generate(Traffic(workload=workload, count=3000))]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean

    assert variation("poisson") == pytest.approx(1.0, abs=0.1)
    assert variation("azure-code") > 3


def test_a_turn_of_a_session_begins_with_what_was_said_before() -> None:
    arrivals = generate(Traffic(workload="sessions", count=300))
    by_prompt = {a.prompt: a for a in arrivals}
    later = [a for a in arrivals if a.prompt[:-2] in by_prompt]
    assert later, "no conversation has two turns"
    for turn in later:
        before = by_prompt[turn.prompt[:-2]]
        assert turn.prompt[len(before.prompt)] == (before.answer, before.output_len)
        assert turn.at >= before.at
    assert len({a.answer for a in arrivals}) == len(arrivals)


def test_tenants_ask_by_zipfs_law() -> None:
    counts = {f"tenant-{n}": 0 for n in (1, 2, 3)}
    for a in generate(Traffic(workload="poisson", count=2200, tenants=3)):
        counts[a.tenant] += 1
    assert counts["tenant-1"] == pytest.approx(1200, rel=0.1)
    assert counts["tenant-3"] == pytest.approx(400, rel=0.2)


def test_scaling_and_merging() -> None:
    arrivals = [alone(10.0, 100, 40, 0), alone(20.0, 1, 1, 1)]
    faster = scale(arrivals, rate=2, length=0.1)
    assert [(a.at, a.prompt_len, a.output_len) for a in faster] == [(5.0, 10, 4), (10.0, 1, 1)]
    both = merge(arrivals, [alone(15.0, 100, 40, 0)])
    assert [a.at for a in both] == [10.0, 15.0, 20.0]
    assert len({a.prompt[0][0] for a in both}) == 3, "requests of different streams share a prompt"


def test_azure_csv(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.0,5,0\n"
    )
    arrivals = read_trace(path)
    assert [(a.prompt_len, a.output_len) for a in arrivals] == [(374, 44), (396, 109)]
    assert arrivals[0].at == 0
    assert arrivals[1].at == pytest.approx(4.314579, abs=1e-4)
    assert len(read_trace(path, 1)) == 1


def test_mooncake_jsonl_names_blocks_that_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    records = [
        {"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
    ]
    path.write_text("\n".join(json.dumps(r) for r in records))
    first, second = read_trace(path)
    assert first.prompt == ((0, 512), (1, 512), (2, 76))
    assert second.prompt == ((0, 512), (9, 88))
    assert (first.at, second.at) == (0.0, 3.0)


def test_own_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"at": 2, "prompt_tokens": 30, "output_tokens": 4, "tenant": "a", "priority": 1, "prefix": [[7, 20]]}\n'
        '\n{"at": 1, "prompt_tokens": 20, "output_tokens": 4, "deadline_s": 3, "prefix": [[7, 20]]}\n'
    )
    first, second = read_trace(path)
    assert (first.at, first.prompt, first.deadline_s) == (0.0, ((7, 20),), 3.0)
    assert (second.at, second.prompt[0], second.prompt_len) == (1.0, (7, 20), 30)
    assert (second.tenant, second.priority) == ("a", 1)


def test_a_journal_is_a_trace_of_its_own_requests(tmp_path: Path) -> None:
    """What an engine recorded comes again at the same times, with the same prompts and lengths."""
    config = small_config(journal=str(tmp_path / "journal"))
    profile, clock = small_profile(), VirtualClock()
    executor = FakeExecutor(profile.executor_info(config), clock=clock)
    engine = RecordedEngine(executor, config, clock=clock, secret=b"journal")
    arrivals = generate(Traffic(workload="poisson", count=6, rate=2.0, input_len=20, output_len=7))
    for number, arrival in enumerate(arrivals):
        while clock.now() < arrival.at:
            if engine.busy:
                engine.step()
            else:
                clock.advance_to(arrival.at)
        request = GenerateRequest(
            rid=number, tokens=[1] * 16 + [number] * 4, sampling=SamplingParams(max_tokens=7, seed=1), tenant="t"
        )
        engine.submit([Submit(request)])
    while engine.busy:
        engine.step()
    engine.close()
    read = read_trace(tmp_path / "journal")
    assert [a.output_len for a in read] == [7] * 6
    assert [a.prompt_len for a in read] == [20] * 6
    assert read[0].prompt == ((1, 16), (0, 4))
    assert {a.tenant for a in read} == {"t"}
    for wanted, got in zip(arrivals, read, strict=True):
        assert wanted.at <= got.at + 1e-6 < wanted.at + 0.2, "within a step of when it came"


def test_a_journal_of_two_lives_keeps_their_requests_apart(tmp_path: Path) -> None:
    """An engine that is started again counts its requests from the beginning."""
    config, profile = small_config(journal=str(tmp_path / "journal"), max_queue=1), small_profile()
    for life, length in enumerate((5, 9)):
        clock = VirtualClock()
        clock.advance_to(100.0 * life)
        executor = FakeExecutor(profile.executor_info(config), clock=clock)
        engine = RecordedEngine(executor, config, clock=clock, secret=b"journal")
        sampling = SamplingParams(max_tokens=length, seed=1)
        requests = [GenerateRequest(rid=rid, tokens=[life + 1] * 8, sampling=sampling) for rid in (0, 1, 2)]
        engine.submit([Submit(request) for request in requests])  # more than the queue holds
        while engine.busy:
            engine.step()
        engine.close()
    read = read_trace(tmp_path / "journal")
    assert sorted(a.output_len for a in read) == [5, 9]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"at": 0, "prompt_tokens": 3, "output_tokens": 2}\n{"at": 1}\n', "line 2: there is no 'prompt_tokens'"),
        ('{"at": 0, "prompt_tokens": 3, "output_tokens": 2, "prefix": [[1, 9]]}\n', "line 1: the prefix has 6 tokens"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1]}\n', "fewer tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2"),
        ("hello\n", "no trace that can be read"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
    ],
)
def test_a_broken_trace_is_refused_with_the_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_trace(path)


def test_a_file_that_is_no_text_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read: .*Check --trace"):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize(("traffic", "match"), [
    ({"count": 0}, "0 requests at 1.0 a second"), ({"rate": 0.0}, "at 0.0 a second"),
    ({"rate": float("nan")}, "at nan a second"), ({"workload": "rush"}, "'rush' is unknown; use one of .*burstgpt"),
])  # fmt: skip
def test_what_is_no_workload_is_refused(traffic: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        generate(Traffic(**traffic))
