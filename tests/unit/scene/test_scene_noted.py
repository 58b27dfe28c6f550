"""What a watcher notes beside scenes: where the time of the engine's thread goes, and how long KV blocks keep what they
hold, beside what a slow witness of every plan finds."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace
from scenekit import INFO, Watched, traffic

from ropeway.contract import (
    Command,
    GenerateRequest,
    Row,
    SamplingParams,
    Step,
    StepPlan,
    Submit,
    Tier,
)
from ropeway.contract.codec import decode_report, encode
from ropeway.contract.scene import PARTS, BlockLife, Noted
from ropeway.observe.metrics import Metrics
from ropeway.scene.residence import ASKED, Residence

SECONDS = {"plan": 0.001, "submit": 0.003, "collect": 0.005, "commit": 0.002, "tell": 0.0005}
"""What each call of a slow engine takes."""


def slow(depth: int = 1) -> Watched:
    """A watched engine each part of which takes time of its own."""
    watched = Watched(depth=depth)

    def takes(seconds: float, owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            watched.clock.advance(seconds)
            return work(*arguments)

        setattr(owner, name, timed)

    takes(SECONDS["plan"], watched.engine.scheduler, "plan")
    takes(SECONDS["submit"], watched.executor, "submit")
    takes(SECONDS["collect"], watched.executor, "collect")
    takes(SECONDS["commit"], watched.engine.scheduler, "commit")
    takes(SECONDS["tell"], watched, "send")
    return watched


@pytest.mark.parametrize("depth", [1, 2])
def test_every_moment_of_work_is_in_one_part_and_none_of_rest_is(depth: int) -> None:
    watched = slow(depth=depth)
    computing = [0.0]
    advance = watched.clock.advance

    def note(seconds: float) -> None:
        computing[0] += seconds
        advance(seconds)

    watched.clock.advance = note  # type: ignore[method-assign]
    idle = [0.0]
    recv = watched.recv

    def listen(*, wait: bool) -> list[Command] | None:
        before = computing[0]
        found = recv(wait=wait)
        idle[0] += (computing[0] - before) if wait else 0.0
        return found

    watched.recv = listen  # type: ignore[method-assign]
    watched.run(traffic(3, 60))
    noted = [report for report in watched.reports if isinstance(report, Noted)]
    spent = dict(zip(PARTS, map(sum, zip(*(one.seconds for one in noted), strict=True)), strict=True))
    steps = len(watched.executor.plans)
    assert idle[0] > 0
    assert sum(spent.values()) == pytest.approx(computing[0] - idle[0] - SECONDS["tell"])  # of the last note
    assert spent["commit"] == pytest.approx(SECONDS["commit"] * steps)
    assert spent["submit"] == pytest.approx(SECONDS["submit"] * steps)
    assert spent["collect"] > SECONDS["collect"] * steps, "there the executor has its own time pass"
    for part in ("plan", "tell"):
        assert spent[part] >= SECONDS[part] * steps - 1e-9


def test_notes_are_rare_and_lose_nothing_when_work_ends() -> None:
    watched = slow()
    watched.run(traffic(4, 80))
    kinds = [type(report) for report in watched.reports]
    assert kinds.count(Noted) < kinds.count(Step) / 5
    *_, last = [report for report in watched.reports if isinstance(report, Noted | Step)]
    assert isinstance(last, Noted), "before it rests, an engine says what it has noted"
    assert decode_report(encode(last)[4:]) == last


def test_parts_are_added_up_over_engines() -> None:
    metrics = Metrics("m")
    for _ in range(2):
        metrics.on_report(Noted([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    (family,) = [one for one in metrics.families() if one.name == "ropeway_engine_seconds"]
    assert [(one.labels["part"], one.value) for one in family.samples] == [
        ("listen", 2), ("plan", 4), ("submit", 6), ("collect", 8), ("commit", 10), ("tell", 12),
    ]  # fmt: skip


class Witness:
    """Remembers all that happens to every block, and does the sums at the end."""

    def __init__(self) -> None:
        self.happened: dict[int, list[tuple[bool, float]]] = defaultdict(list)  # whether it was handed out, and when

    def planned(self, plan: StepPlan, now: float) -> None:
        seen: set[int] = set()
        brought = {copy.target for copy in plan.copies if copy.target_tier == "device"}
        for block in [block for admit in plan.admit for block in admit.blocks]:
            self.happened[block].append((block in brought and block not in seen, now))
            seen.add(block)
        for block in [block for row in plan.rows for block in row.new_blocks]:
            self.happened[block].append((True, now))

    def lives(self) -> list[BlockLife]:
        found = []
        for told in self.happened.values():
            starts = [number for number, (handed_out, _) in enumerate(told) if handed_out]
            for first, last in pairwise(starts):
                begun, *asked = [moment for _, moment in told[first:last]]
                gaps = [later - earlier for earlier, later in pairwise(asked[-ASKED:])]
                ended = told[last][1]
                found.append(BlockLife(ended - begun, ended - [begun, *asked][-1], gaps))
        return sorted(found, key=lambda life: (life.lifetime, life.idle, life.gaps))


def conversations(count: int) -> Any:
    """Requests whose prompts begin alike, so that blocks are found again, and more of them than there is room for."""
    draw, made = Random(7), 0

    def script() -> list[Command] | None:
        nonlocal made
        if made == count:
            return None
        made += 1
        prompt = [draw.randrange(4)] * draw.randrange(8, 60) + [made % 50]
        return [Submit(GenerateRequest(rid=made, tokens=prompt, sampling=SamplingParams(max_tokens=12)))]

    return script


@pytest.mark.parametrize("tiers", [False, True])
def test_lives_of_blocks_are_those_that_a_witness_finds(tiers: bool) -> None:
    info = replace(INFO, tiers=[Tier("host", 30)]) if tiers else INFO
    watched, witness = Watched(info=info, sample=1.0, preemption_mode="swap"), Witness()
    submit = watched.executor.submit

    def witnessed(plan: StepPlan) -> int:
        witness.planned(plan, watched.clock.now())
        return submit(plan)

    watched.executor.submit = witnessed  # type: ignore[method-assign]
    watched.run(conversations(150))
    noted = [life for report in watched.reports if isinstance(report, Noted) for life in report.blocks]
    lives = sorted(noted, key=lambda life: (life.lifetime, life.idle, life.gaps))
    assert lives == witness.lives()
    assert len(lives) > 100
    assert any(life.gaps for life in lives)
    assert any(plan.copies for plan in watched.executor.plans) == tiers


def test_a_sample_is_of_that_share_and_costs_no_more_memory_than_blocks() -> None:
    residence, whole = Residence(0.25, Random(1)), Residence(1.0)
    plans = [StepPlan(step, [], [], [_row([step % 40])], []) for step in range(4000)]
    for residing in (residence, whole):
        for plan in plans:
            residing.planned(plan, float(plan.step))
    sampled, all_of_them = residence.take(), whole.take()
    assert len(all_of_them) == 4000 - 40
    assert 0.2 < len(sampled) / len(all_of_them) < 0.3
    assert {life.lifetime for life in sampled} == {40.0}
    assert residence.take() == []


def _row(blocks: list[int]) -> Row:
    return Row(1, 1, 0, 0, 1, True, blocks)


def test_the_metrics_of_blocks_are_shown_when_asked_for() -> None:
    for blocks in (False, True):
        metrics = Metrics("m", blocks=blocks)
        metrics.on_report(Noted([0.0] * len(PARTS), [BlockLife(8.0, 2.0, [1.0, 3.0])]))
        found = {one.name: one.value for family in metrics.families() for one in family.samples}
        names = {name for name in found if name.startswith("vllm:kv_block_")}
        assert bool(names) == blocks
    assert [found[f"vllm:kv_block_{name}_seconds_sum"] for name in ("lifetime", "idle_before_evict", "reuse_gap")] == [
        8.0, 2.0, 4.0,
    ]  # fmt: skip
