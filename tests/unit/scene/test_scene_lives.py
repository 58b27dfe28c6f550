"""The lives that a watcher writes down are those that the engine's accounts tell of, and watching changes nothing."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
from scenekit import WALL, Watched, traffic

from ropeway.contract import (
    Command,
    ExecutorInfo,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Step,
    Submit,
    Usage,
)
from ropeway.contract.codec import decode_report, encode
from ropeway.contract.scene import MOST_CHUNKS, Life, Recall, Recalled, Span
from ropeway.recorder.journal import files
from ropeway.scene import lives as room
from ropeway.sim.replay import replay

COUNT = 100


def told(watched: Watched, rids: list[int] | None = None) -> dict[int, Life]:
    now = watched.clock.now()
    found = watched.watcher.lives.recall(rids or range(1, COUNT + 10), WALL, now)
    return {life.rid: life for life in found}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_lives_are_as_the_engine_accounts_for_them(seed: int, depth: int) -> None:
    watched = Watched(depth=depth)
    watched.run(traffic(seed, COUNT))
    lives = told(watched)
    assert lives.keys() == watched.ends.keys()
    assert sum(end.usage is not None and end.usage.preemptions for end in watched.ends.values()) > 1
    boarded = {(admit.rid, admit.epoch): admit for plan in watched.executor.plans for admit in plan.admit}
    for rid, life in lives.items():
        end = watched.ends[rid]
        assert life.finish == end.finish
        check_shape(life)
        if end.finish is FinishReason.REJECTED:
            continue
        assert end.usage is not None
        check_account(life, end.usage)
        aboard = [span for span in life.spans if span.phase == "prefill"]
        assert (rid, len(aboard) + 1) not in boarded
        for epoch, span in enumerate(aboard, 1):
            admit = boarded[rid, epoch]
            assert (span.seat, span.cached) == (admit.slot, admit.computed)
            places = [admit.computed, *(chunk.start + chunk.count for chunk in span.chunks)]
            assert [chunk.start for chunk in span.chunks] == places[:-1]
            after = life.spans[life.spans.index(span) + 1 :]
            if after and after[0].phase == "decode":
                assert places[-1] == len(admit.tokens)  # all that was known of it has been read
    check_seats(list(lives.values()))


def check_shape(life: Life) -> None:
    """A life is one phase after the other, without a gap, and each wait is accounted for."""
    assert life.spans[0].phase == "queue"
    assert life.spans[0].begin == 0
    order = {"queue": {"prefill"}, "prefill": {"decode", "queue"}, "decode": {"queue"}}
    for one, after in pairwise(life.spans):
        assert after.phase in order[one.phase]
        assert one.end == after.begin
    for span in life.spans:
        assert span.end is not None
        assert (span.seat is None) == (span.phase == "queue")
        if span.phase == "queue":
            assert sum(wait.seconds for wait in span.waits) == pytest.approx(span.end - span.begin)
            assert all(wait.reason for wait in span.waits)
        for chunk in span.chunks:
            assert span.begin <= chunk.begin
            assert chunk.end is None or chunk.begin <= chunk.end
            assert (span.first_step or 0) <= chunk.step <= (span.last_step or 0)


def check_account(life: Life, usage: Usage) -> None:
    assert (life.prompt_tokens, life.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    waits = [span for span in life.spans if span.phase == "queue"]
    decodes = [span for span in life.spans if span.phase == "decode"]
    assert len(waits) == usage.preemptions + 1
    assert life.spans[-1].end == pytest.approx(usage.total_s)
    assert sum([life.seconds.queue, life.seconds.prefill, life.seconds.decode]) == pytest.approx(usage.total_s)
    if usage.first_scheduled_s is not None:
        assert waits[0].end == pytest.approx(usage.first_scheduled_s)
    if usage.first_token_s is not None:
        assert decodes[0].begin == pytest.approx(usage.first_token_s)
    if life.finish != "timeout":  # whose last step may still have been under way
        assert bool(decodes) == (usage.first_token_s is not None)


def check_seats(lives: list[Life]) -> None:
    """Nobody sits in a seat before the one before has left it."""
    taken: dict[int, list[tuple[float, float]]] = {}
    for life in lives:
        for span in life.spans:
            if span.seat is not None and span.end is not None:
                stretch = life.arrived + span.begin, life.arrived + span.end
                taken.setdefault(span.seat, []).append((round(stretch[0], 4), round(stretch[1], 4)))
    assert taken
    for stretches in taken.values():
        for (_, left), (came, _) in pairwise(sorted(stretches)):
            assert left <= came


@pytest.mark.parametrize(
    ("depth", "settings"), [(1, {}), (2, {"scheduling_policy": "fair"}), (1, {"batching": "static"})]
)
def test_to_be_watched_changes_no_decision_and_to_be_asked_no_text(depth: int, settings: dict[str, str]) -> None:
    unseen = Watched(depth=depth, bare=True, **settings)
    seen = Watched(depth=depth, every=inf, **settings)
    asked = Watched(depth=depth, **settings)
    for one in (unseen, seen, asked):
        one.run(traffic(3, COUNT))
    assert seen.events == unseen.events
    assert seen.executor.plans == unseen.executor.plans
    texts = [answers(one) for one in (unseen, asked)]
    whole = {rid for rid, end in unseen.ends.items() if end.finish is FinishReason.LENGTH == asked.ends[rid].finish}
    assert len(whole) > COUNT / 2
    assert all(texts[0][rid] == texts[1][rid] for rid in whole)
    assert asked.watcher._reasons
    assert not asked.explained()  # the answers were not the service's


def answers(watched: Watched) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in watched.events:
        found.setdefault(event.rid, []).extend(event.tokens)
    return found


@pytest.mark.parametrize("depth", [1, 2])
def test_a_journal_tells_the_same_lives(tmp_path: Path, depth: int) -> None:
    watched = Watched(journal=tmp_path, depth=depth)
    watched.run(traffic(4, COUNT))
    watched.engine.close()
    summary = replay(tmp_path, watch=True)
    assert summary.difference is None
    [witness] = summary.witnesses
    again = {life.rid: life for life in witness.lives}
    lives = told(watched)
    assert again.keys() == lives.keys()
    moved = witness.header.started - witness.header.clock - WALL
    for rid, life in lives.items():
        other = again[rid]
        assert other.arrived - moved == pytest.approx(life.arrived, abs=1e-4)
        assert (other.seconds, other.finish, other.completion_tokens) == (
            life.seconds, life.finish, life.completion_tokens,
        )  # fmt: skip
        assert other.spans == life.spans
    used = [point.values["KV blocks"]["used"] for point in witness.points if "KV blocks" in point.values]
    assert max(used) > 12
    assert used[-1] == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_journal_that_begins_in_the_middle_goes_on_with_the_same_lives(tmp_path: Path, depth: int) -> None:
    """Its snapshot tells of those who waited, read and generated then."""
    watched = Watched(journal=tmp_path, depth=depth, max_num_batched_tokens=12)

    def begin_a_file_now_and_then(step: Step) -> None:
        reads = any(seq.computed + 1 < seq.known for seq in watched.engine.scheduler.running)
        if reads and step.stats.step % 8 == 0:
            watched.engine._journal._end = 0  # type: ignore[attr-defined]

    watched.at_step = begin_a_file_now_and_then
    watched.run(traffic(6, 40))
    watched.engine.close()
    [whole] = replay(tmp_path, watch=True).witnesses
    zero = whole.header.started - whole.header.clock
    found: Counter[str] = Counter()
    for oldest in files(tmp_path)[:-1]:
        oldest.unlink()
        summary = replay(tmp_path, watch=True)
        assert summary.difference is None
        [rest] = summary.witnesses
        begun, first = rest.header.clock, summary.first_step
        lives = {life.rid: life for life in rest.lives}
        for life in whole.lives:
            # Of a prompt whose last tokens are under way as the file begins, the answer alone is left.
            seen = [span for span in life.spans if span.phase != "prefill" or span.last_step >= first]
            after = later(seen, begun - life.arrived + zero)
            reads = [span for span in seen if span.phase == "prefill" and span.first_step < first]
            left = [sum(chunk.count for chunk in span.chunks if chunk.step >= first) for span in reads]
            if after and 1 not in left:  # the last token of all could as well be the newest
                other = lives[life.rid]
                assert later(other.spans, begun - life.arrived + zero) == after
                assert (other.finish, other.completion_tokens) == (life.finish, life.completion_tokens)
                assert other.arrived - rest.header.started + begun == pytest.approx(life.arrived - zero, abs=1e-4)
                found[after[0][0]] += life.arrived - zero < begun
    assert min(found[phase] for phase in ("queue", "prefill", "decode")) > 2


def later(spans: list[Span], moment: float) -> list[tuple[str, int | None, float]]:
    """Those that end after `moment`: their phases, seats and ends."""
    return [
        (span.phase, span.seat, round(span.end, 4))
        for span in spans
        if span.end is not None and span.end > moment + 1e-6
    ]


def test_what_ended_long_ago_is_forgotten() -> None:
    watched = Watched()
    watched.watcher.lives = room.Lives(keep=10)
    watched.run(traffic(0, 40))
    ended = list(watched.ends)
    assert sorted(told(watched)) == sorted(ended[-10:])
    assert len(watched.watcher.lives._aboard) == len(watched.watcher.lives._open) == 0


def test_a_long_prompt_keeps_a_bounded_number_of_chunks() -> None:
    long = ExecutorInfo(
        model="fake", device="sim", dtype="none", num_blocks=200, block_size=8, max_slots=2, max_model_len=1600,
        vocab_size=90,
    )  # fmt: skip
    watched = Watched(info=long, max_num_batched_tokens=8)
    turns = iter([[Submit(GenerateRequest(rid=1, tokens=[1] * 1500, sampling=SamplingParams(max_tokens=2)))]])
    watched.run(lambda: next(turns, None))
    [life] = told(watched, [1]).values()
    chunks = life.spans[1].chunks
    assert len(chunks) == MOST_CHUNKS
    assert chunks[-1].start + chunks[-1].count == 1500
    assert sum(chunk.count for chunk in chunks) == 1500
    assert chunks[-1].end == life.spans[1].end


def test_a_service_asks_for_lives_by_a_command() -> None:
    watched, script, asked = Watched(), traffic(1, 20), iter([[Recall(7, [1, 2, 999])]])

    def turn() -> list[Command] | None:
        found = script()
        return next(asked, None) if found is None else found

    watched.run(turn)
    [answer] = [report for report in watched.reports if isinstance(report, Recalled)]
    assert answer.token == 7
    assert [life.rid for life in answer.lives] == [1, 2]
    assert decode_report(encode(answer)[4:]) == answer
