"""The flight recorder: what was recorded is decided again, and what differs is found."""

from __future__ import annotations

import itertools
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import journalkit
import msgspec
import pytest
from journalkit import config, drive, engine_for

from ropeway.cli.main import main
from ropeway.contract import Cancel, Explain, GenerateRequest, Reorder, SamplingParams, Submit, Tier
from ropeway.errors import ConfigError
from ropeway.recorder.journal import MAGIC, Called, Planned, files, read
from ropeway.recorder.recorder import RecordedEngine
from ropeway.scheduler import Scheduler, TargetLatency
from ropeway.sim import CostModel, FakeExecutor, VirtualClock, expected_tokens
from ropeway.sim.replay import replay
from ropeway.sim.tape import requests


def record(directory: Path, count: int = 60, *, close: bool = True, **changes: Any) -> list[Any]:
    clock = VirtualClock()
    engine = engine_for(config(directory, **changes), clock)
    events = drive(engine, clock, 1, count)
    if close:
        engine.close()
    return events


@pytest.mark.slow
def test_ten_thousand_requests_and_a_killed_engine_are_decided_again_identically(tmp_path: Path) -> None:
    command = [sys.executable, journalkit.__file__, str(tmp_path)]
    with subprocess.Popen([*command, "1", "10000"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if int(line) > 5000:
                first.kill()  # in the middle of a step, or of writing
                break
        first.stdout.read()
    assert first.returncode == -9
    came = len(requests(tmp_path))
    assert 5000 <= came < 10000
    subprocess.run([*command, str(came + 1), str(10000 - came)], check=True, stdout=subprocess.DEVNULL)
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.requests == 10000
    assert len({header.life for _, header in summary.headers}) == 2
    assert summary.preemptions > 10
    assert summary.finishes["cancelled"] > 100
    assert summary.finishes["length"] > 9000
    assert sum(summary.finishes.values()) < 10000  # some were killed with their engine


def test_two_steps_under_way_are_decided_again(tmp_path: Path) -> None:
    """Also where a new file, with a snapshot of the engine, begins while one of them is computed."""
    clock = VirtualClock()
    executor = FakeExecutor(msgspec.structs.replace(journalkit.info(), depth=2), clock=clock, cost=CostModel())
    engine = RecordedEngine(executor, config(tmp_path, journal_mb=1), clock=clock, secret=b"s")
    drive(engine, clock, 1, 1500)
    engine.close()
    assert len(files(tmp_path)) > 1
    assert replay(tmp_path).difference is None


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
def test_what_tiers_bring_back_is_decided_again(tmp_path: Path, mode: str) -> None:
    clock = VirtualClock()
    tiers = (Tier("host", 30), Tier("disk", 60, lasting=True))
    damage = itertools.count(1)
    engine = engine_for(
        config(tmp_path, preemption_mode=mode), clock, blocks=24, tiers=tiers, spoilt=lambda _: next(damage) % 20 == 0
    )
    drive(engine, clock, 1, 1200)
    assert sum(tier.hits for tier in engine.scheduler.memory.stats()) > 20
    engine.close()
    assert replay(tmp_path).difference is None


def test_a_record_tells_how_it_ends(tmp_path: Path) -> None:
    record(tmp_path / "good")
    assert replay(tmp_path / "good").notes == []
    record(tmp_path / "killed", close=False)
    assert "killed" in replay(tmp_path / "killed").notes[-1]


@pytest.mark.parametrize("lost", [1, 3, 9, 40, 300])
def test_a_torn_frame_is_left_out_and_said(tmp_path: Path, lost: int) -> None:
    record(tmp_path, close=False)
    (file,) = files(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[:-lost])
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.steps > 10
    assert any("ends within a frame" in note for note in summary.notes)
    file.write_bytes(data[:-lost] + bytes(lost))
    assert any("ends within a frame" in note for note in replay(tmp_path).notes)
    file.write_bytes(data + bytes(3))
    assert any("its last 3 bytes are left out" in note for note in replay(tmp_path).notes)


def test_a_step_under_way_when_the_engine_died_is_in_the_record(tmp_path: Path) -> None:
    clock = VirtualClock()
    executor = FakeExecutor(journalkit.info(), clock=clock)
    engine = RecordedEngine(executor, config(tmp_path), clock=clock)
    engine.submit([Submit(GenerateRequest(rid=1, tokens=[1, 2], sampling=SamplingParams(max_tokens=9)))])
    engine.step()
    seen = []
    executor.submit = lambda plan: seen.append(files(tmp_path)[0].read_bytes()) or 0  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(IndexError):
        engine.step()
    # What was on disk while the second step ran is what a kill would have left.
    files(tmp_path)[0].write_bytes(seen[0])
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.steps == 2
    assert "Step 2 was under way" in summary.notes[0]


def test_a_failing_executor_fails_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    executor = FakeExecutor(journalkit.info(), clock=clock)
    engine = RecordedEngine(executor, config(tmp_path), clock=clock)
    executor.collect = lambda ticket: 1 // 0  # type: ignore[assignment,method-assign,return-value]
    engine.submit([Submit(GenerateRequest(rid=1, tokens=[1, 2], sampling=SamplingParams()))])
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.close()
    summary = replay(tmp_path)
    assert summary.difference is None
    assert "fails again: ZeroDivisionError" in summary.notes[0]


def test_a_changed_record_and_a_changed_engine_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 300)
    with pytest.raises(SystemExit) as done:
        main(["replay", str(tmp_path)])
    assert not done.value.code
    assert "Identical" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path), "--explain", "301"])
    assert "Request 301 does not occur." in capsys.readouterr().out
    tokens, calls = TargetLatency.tokens, itertools.count()

    def other(*given: Any) -> int:
        return tokens(*given) if next(calls) < 30 else 3

    monkeypatch.setattr(TargetLatency, "tokens", other)
    summary = replay(tmp_path)
    monkeypatch.undo()
    assert summary.difference is not None
    assert summary.steps > 1
    assert summary.difference.expected != summary.difference.found
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "cancel", lambda *given: None)
        with pytest.raises(SystemExit) as done:
            main(["replay", str(tmp_path)])
    assert done.value.code == 1
    said = capsys.readouterr().out
    assert "Different in step" in said
    assert "expected" in said


def test_one_flipped_number_in_a_plan_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path)

    def flipped(path: Path) -> Any:
        header, items = read(path)
        changed = []
        for item in items:
            if isinstance(item, Planned) and item.plan.step == 20:
                row = item.plan.rows[-1]
                rows = [*item.plan.rows[:-1], msgspec.structs.replace(row, slot=row.slot + 1)]
                item = Planned(msgspec.structs.replace(item.plan, rows=rows), item.moments)
            changed.append(item)
        return header, iter(changed)

    monkeypatch.setattr("ropeway.sim.replay.read", flipped)
    summary = replay(tmp_path)
    assert summary.last_step == 20
    assert summary.steps == 19
    assert summary.difference is not None
    assert len(summary.difference.expected) == len(summary.difference.found) == 1
    assert "slot=" in summary.difference.expected[0]


def call(**changes: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """Makes something else of what the record says of the call that planned step 20."""

    def tamper(items: Iterable[Any]) -> list[Any]:
        items = list(items)
        at = next(n for n, item in enumerate(items) if isinstance(item, Planned) and item.plan.step == 20)
        at = next(n for n in range(at, len(items)) if isinstance(items[n], Called))
        given = {name: change(getattr(items[at], name)) for name, change in changes.items()}
        items[at] = msgspec.structs.replace(items[at], **given)
        return items

    return tamper


def twice(items: Iterable[Any]) -> list[Any]:
    """As if step 20 had been planned twice."""
    return [item for item in items for _ in range(2 if isinstance(item, Planned) and item.plan.step == 20 else 1)]


def unplanned(items: Iterable[Any]) -> list[Any]:
    """As if step 20 had not been planned, and the clock looked at all the same."""
    items = list(items)
    at = next(n for n, item in enumerate(items) if isinstance(item, Planned) and item.plan.step == 20)
    gone = items.pop(at)
    items[at] = msgspec.structs.replace(items[at], moments=[*gone.moments, *items[at].moments])
    return items


@pytest.mark.parametrize(("tamper", "what"), [
    (call(error=lambda _: "ValueError: planted"), "the call ends otherwise"),
    (call(ended=lambda ended: [*ended, (1, "stop")]), "other requests end"),
    (call(moments=lambda moments: [*moments, moments[-1]]), "asks less often for the time"),
    (call(moments=lambda moments: moments[:-1]), "a look at the clock is not in the record"),
    (call(results=lambda _: []), "a look at a result is not in the record"),
    (twice, "a recorded step is not planned"),
    (unplanned, "a step is not in the record"),
])  # fmt: skip
def test_a_record_of_an_engine_that_did_otherwise_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Any], list[Any]], what: str
) -> None:
    record(tmp_path)

    def tampered(path: Path) -> Any:
        header, items = read(path)
        return header, iter(tamper(items))

    monkeypatch.setattr("ropeway.sim.replay.read", tampered)
    summary = replay(tmp_path)
    assert summary.difference is not None
    assert what in summary.difference.what
    assert 18 <= summary.steps <= 21


def test_a_state_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, 3)

    def renamed(path: Path) -> Any:
        header, items = read(path)
        [first, *rest] = header.state
        state = [["ropeway.scheduler.gone:Gone", *first[1:]], *rest]
        return msgspec.structs.replace(header, state=state, version="0.0.1"), items

    monkeypatch.setattr("ropeway.sim.replay.read", renamed)
    with pytest.raises(ConfigError, match=r"cannot be made again .*the version that recorded it, 0\.0\.1\."):
        replay(tmp_path)


def test_files_are_bounded_and_each_can_be_replayed_alone(tmp_path: Path) -> None:
    clock = VirtualClock()
    engine = engine_for(config(tmp_path, journal_mb=1), clock)
    engine._journal._limit, engine._journal._end = 300_000, 0  # type: ignore[attr-defined]
    drive(engine, clock, 1, 900)
    engine.close()
    found = files(tmp_path)
    assert len(found) > 1
    assert found[0].stem != "00000001"
    assert sum(path.stat().st_size for path in found) < 310_000
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.first_step > 1
    alone = [replay(path) for path in found]
    assert [one.difference for one in alone] == [None] * len(found)
    assert sum(one.steps for one in alone) == summary.steps
    assert alone[-1].last_step == summary.last_step
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}


def test_questions_and_changes_of_policy_are_recorded(tmp_path: Path) -> None:
    clock = VirtualClock()
    engine = engine_for(config(tmp_path), clock)
    for number, policy in enumerate(("sjf", "fair", "fcfs")):
        drive(engine, clock, 1 + 100 * number, 40)
        for rid in range(40):
            engine.submit([Submit(journalkit.ask(100 * number + 50 + rid, random.Random(rid)))])
        engine.submit([Reorder(number, policy), Explain(number)])
        drive(engine, clock, 90 + 100 * number, 5)
    engine.close()
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.requests == 3 * 85


def test_a_life_is_told(tmp_path: Path) -> None:
    clock = VirtualClock()
    engine = engine_for(config(tmp_path, max_num_seqs=2), clock)
    for rid in (1, 2, 3):
        request = GenerateRequest(rid=rid, tokens=[rid] * 20, sampling=SamplingParams(max_tokens=5, seed=rid))
        engine.submit([Submit(request)])
    while engine.busy:
        engine.step()
    engine.close()
    (told,) = replay(tmp_path, explain=3).biographies
    what = " | ".join(line for _, line in told.lines)
    order = ["comes: 20 tokens of prompt", "waits, at place", "seats", "boards in step", "first token", "ends (length)"]
    assert [what.find(word) for word in order] == sorted(what.find(word) for word in order)
    assert min(what.find(word) for word in order) >= 0
    assert told.lines[-1][0] == pytest.approx(clock.now())
    assert replay(tmp_path, explain=9).biographies[0].lines == []
    assert replay(tmp_path, until=2).steps == 2


def test_preemptions_are_told(tmp_path: Path) -> None:
    events = record(tmp_path, 900)
    put_back = next(event.rid for event in events if event.usage is not None and event.usage.preemptions)
    (told,) = replay(tmp_path, explain=put_back).biographies
    assert any("is preempted" in line for _, line in told.lines)
    assert any("boards again" in line for _, line in told.lines)


def test_a_cancellation_is_told(tmp_path: Path) -> None:
    engine = engine_for(config(tmp_path), VirtualClock())
    engine.submit([Submit(GenerateRequest(rid=1, tokens=[1] * 9, sampling=SamplingParams(max_tokens=50)))])
    engine.step()
    engine.submit([Cancel(1)])
    while engine.busy:
        engine.step()
    engine.close()
    (told,) = replay(tmp_path, explain=1).biographies
    what = [line for _, line in told.lines]
    assert "is ended from outside" in what
    assert "cancelled" in what[-1]


def test_a_record_is_a_workload(tmp_path: Path) -> None:
    events = record(tmp_path, 60)
    found = requests(tmp_path)
    assert [one.request.rid for one in found] == list(range(1, 61))
    assert found[0].at == 0
    assert [one.at for one in found] == sorted(one.at for one in found)
    for one in found:
        tokens = [token for event in events if event.rid == one.request.rid for token in event.tokens]
        assert one.output_len == len(tokens)
        if one.finish == "length":
            assert tokens == expected_tokens(one.request, journalkit.info())


def test_a_recorder_that_cannot_write_does_not_hurt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="journal cannot be written"):
        engine_for(config(tmp_path / "file"), VirtualClock())
    clock = VirtualClock()
    engine = engine_for(config(tmp_path / "full"), clock)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda file, data: len(data) - 1)
        events = drive(engine, clock, 1, 20)
    engine.close()
    assert sum(event.finish is not None for event in events) == 20
    assert caplog.text.count("the journal in") == 1
    assert replay(tmp_path / "full").difference is None


def test_an_engine_whose_journal_cannot_go_on_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The place is gone when a new file is due: the record ends there, and nobody is hurt."""
    clock = VirtualClock()
    engine = engine_for(config(tmp_path / "journal"), clock)
    drive(engine, clock, 1, 20)
    (tmp_path / "journal").rename(tmp_path / "kept")
    (tmp_path / "journal").write_text("in its place")
    engine._journal._end = 0  # type: ignore[attr-defined]
    events = drive(engine, clock, 100, 20)
    engine.close()
    assert sum(event.finish is not None for event in events) == 20
    assert caplog.text.count("ends here, it cannot be written") == 1
    summary = replay(tmp_path / "kept")
    assert summary.difference is None
    assert 20 <= summary.requests < 40


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no journal"):
        replay(tmp_path)
    for content in (b"", b"something else", MAGIC, MAGIC + bytes(8)):
        (tmp_path / "1.journal").write_bytes(content)
        with pytest.raises(ConfigError, match=r"like a journal|ends before its state"):
            replay(tmp_path)
    (tmp_path / "1.journal").unlink()
    (tmp_path / "1.journal").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        replay(tmp_path)
