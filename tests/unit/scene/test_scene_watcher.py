"""What a watcher shows of an engine, and when it asks it for reasons."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from scenekit import INFO, WALL, Watched, traffic

from ropeway.contract import (
    Command,
    Explain,
    GenerateRequest,
    Pin,
    SamplingParams,
    Step,
    Submit,
)
from ropeway.contract.codec import decode_command, decode_report, encode
from ropeway.contract.scene import MOST_CELLS, MOST_WAITING, Look, Scene
from ropeway.kv import Memory
from ropeway.scene.cells import CACHED, FREE, PINNED, PRIVATE, SHARED, cells
from ropeway.scene.pace import STEPS, WINDOW, Pace, quantiles


def looks(watched: Watched, seed: int = 2, count: int = 120) -> list[Scene]:
    """Look before every step, as a service that never tires, and check each scene against the engine."""
    script, since, token, over = traffic(seed, count), 0, 100, False

    def asks() -> list[Command] | None:
        nonlocal token, over
        token += 1
        rest = script()
        if over and rest is None and not watched.engine.busy:
            return None
        over = rest is None and not watched.engine.busy
        return [*(rest or []), Look(token, since)]

    found: list[Scene] = []
    send = watched.send

    def hear(report: object) -> None:
        nonlocal since
        if isinstance(report, Scene):
            check_scene(watched, report)
            since = report.happenings[-1].number if report.happenings else since
            found.append(report)
        send(report)  # type: ignore[arg-type]

    watched.send = hear  # type: ignore[method-assign,assignment]
    watched.run(asks)
    return found


def check_scene(watched: Watched, scene: Scene) -> None:
    scheduler = watched.engine.scheduler
    assert scene.at == WALL + watched.clock.now()
    assert [(seat.slot, seat.rid) for seat in scene.seats] == [(seq.slot, seq.rid) for seq in scheduler.running]
    for seat, seq in zip(scene.seats, scheduler.running, strict=True):
        assert seat.reads == (seq.first_token is None or seq.computed < len(seq.tokens) - 1)
        assert seat.blocks == len(seq.blocks)
        assert 0 <= seat.count <= seat.computed <= seat.known + watched.executor.info.depth
    assert scene.waiting_total == len(scheduler.waiting)
    waiting = {seq.rid for seq in scheduler.waiting}
    assert {one.rid for one in scene.waiting} <= waiting
    assert len(scene.waiting) <= MOST_WAITING
    assert [one.position for one in scene.waiting] == list(range(len(scene.waiting)))
    kinds = Counter(scene.cells)
    pool = scheduler.pool
    assert len(scene.cells) == pool.num_blocks
    assert kinds[PRIVATE] + kinds[SHARED] + kinds[PINNED] == pool.used
    assert kinds[FREE] + kinds[CACHED] == pool.available


@pytest.mark.parametrize("depth", [1, 2])
def test_scenes_are_what_the_scheduler_has(depth: int) -> None:
    watched = Watched(depth=depth)
    scenes = looks(watched)
    assert all(decode_report(encode(scene)[4:]) == scene for scene in scenes[:50])
    assert any(seat.reads for scene in scenes for seat in scene.seats)
    assert any(one.reason and one.holder for scene in scenes for one in scene.waiting)
    happened = [one for scene in scenes for one in scene.happenings]
    assert [one.number for one in happened] == list(range(1, len(happened) + 1))  # none lost, none twice
    by = Counter(one.event for one in happened)
    ends = watched.ends
    assert by["queued"] == len(ends)
    assert by["finished"] + by["cancelled"] + by["failed"] == len(ends)
    assert by["preempted"] == sum(end.usage.preemptions for end in ends.values() if end.usage is not None) > 0
    assert by["boarded"] == sum(len(plan.admit) for plan in watched.executor.plans)


def test_reasons_are_asked_for_now_and_then_and_never_when_nobody_waits() -> None:
    watched = Watched()
    asked: list[float] = []
    submit = watched.engine.submit

    def note(commands):  # type: ignore[no-untyped-def]
        asked.extend(watched.clock.now() for command in commands if isinstance(command, Explain))
        assert not any(isinstance(command, Explain) and not watched.engine.scheduler.waiting for command in commands)
        return submit(commands)

    watched.engine.submit = note  # type: ignore[method-assign]
    watched.run(traffic(5, 100))
    assert len(asked) > 5
    assert all(after - before >= 0.25 - 1e-9 for before, after in pairwise(asked))


def test_an_idle_engine_that_is_looked_at_stays_idle() -> None:
    watched = Watched()
    turns = iter([[Look(1)], [Look(2, 5)], None])
    watched.script = lambda: next(turns)
    watched.watcher.run(watched.engine, watched)
    scenes = [report for report in watched.reports if isinstance(report, Scene)]
    assert [scene.token for scene in scenes] == [1, 2]
    assert not watched.executor.steps
    assert not any(isinstance(report, Step) for report in watched.reports)


def test_questions_cross_the_wire() -> None:
    for command in (Look(3, 9), Explain(1, most=50), Explain(2)):
        assert decode_command(encode(command)[4:]) == command


def test_the_map_of_memory() -> None:
    memory = Memory(8, 4)
    pool = memory.pool
    one, two, three, four = pool.alloc(4) or []
    pool.share([two])
    pool.publish(three, b"three")
    pool.release([three])
    memory.pins.add("p", [b"four"], 8)
    memory.publish(four, b"four", "")
    pool.release([four])
    shown = cells(memory)
    assert {shown[one]: "one", shown[two]: "two", shown[three]: "three", shown[four]: "four"} == {
        PRIVATE: "one", SHARED: "two", CACHED: "three", PINNED: "four",
    }  # fmt: skip
    assert Counter(shown)[FREE] == 4
    assert len(cells(Memory(MOST_CELLS, 4))) == MOST_CELLS
    assert len(cells(Memory(MOST_CELLS + 1, 4))) <= MOST_CELLS
    large = Memory(10 * MOST_CELLS, 4)
    large.pool.alloc(5 * MOST_CELLS)
    assert Counter(cells(large)) == {FREE: MOST_CELLS // 2, PRIVATE: MOST_CELLS // 2}


def test_rates_are_those_of_the_last_seconds() -> None:
    pace = Pace(0.0)
    assert pace.rates(1.0).generation_tps is None
    for number in range(1, 101):
        pace.stepped(100.0 + number * 0.1, 5, 10)
        pace.began(100.0 + number * 0.1, number / 100)
    rates = pace.rates(110.0)
    assert rates.generation_tps == pytest.approx(100, rel=0.02)
    assert rates.prompt_tps == pytest.approx(50, rel=0.02)
    assert (rates.itl_p50, rates.itl_p99) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (rates.ttft_p50, rates.ttft_p99) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.99, abs=0.02))
    assert pace.rates(110.0 + 2 * WINDOW).generation_tps is None
    pace.rest()
    pace.stepped(500.0, 0, 1)
    pace.stepped(500.5, 0, 1)
    assert pace.rates(501.0).itl_p99 == pytest.approx(0.5)  # the rest between is nobody's wait
    for number in range(3 * STEPS):
        pace.stepped(600 + number * 0.001, 0, 8)
    assert pace.rates(600 + 3 * STEPS * 0.001).generation_tps == pytest.approx(8000, rel=0.01)


def test_quantiles_weigh() -> None:
    assert quantiles([]) == (None, None)
    assert quantiles([(1.0, 98), (2.0, 1), (9.0, 1)]) == (1.0, 2.0)
    assert quantiles([(1.0, 1)]) == (1.0, 1.0)


def test_a_pin_is_seen() -> None:
    watched = Watched()
    prompt = list(range(16))
    one = GenerateRequest(rid=1, tokens=[*prompt, 1], sampling=SamplingParams(max_tokens=1))
    turns = iter([[Pin(1, "p", prompt)], [Submit(one)]])
    watched.run(lambda: next(turns, None))
    assert Counter(cells(watched.engine.scheduler.memory))[PINNED] == 2
    assert INFO.num_blocks == len(cells(watched.engine.scheduler.memory))
