"""A trace that Chrome's format allows: within a thread slices lie beside or inside each other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scenekit import Watched, traffic

from ropeway.cli.main import main
from ropeway.scene.trace import Story, trace
from ropeway.scheduler.scheduler import Scheduler


def slices(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


def check_nesting(events: list[dict[str, Any]]) -> None:
    for thread in slices(events).values():
        open_until: list[float] = []
        for event in sorted(thread, key=lambda one: (one["ts"], -one["dur"])):
            assert event["ts"] >= 0
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_journal_becomes_a_trace(tmp_path: Path, depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(journal=tmp_path / "journal", depth=depth)
    watched.run(traffic(6, 120))
    watched.engine.close()
    output = tmp_path / "trace.json"
    with pytest.raises(SystemExit) as done:
        main(["trace", str(tmp_path / "journal"), "-o", str(output)])
    assert not done.value.code
    assert f"{len(watched.ends)} requests" in capsys.readouterr().out
    made = json.loads(output.read_text())
    events = made["traceEvents"]
    check_nesting(events)
    kinds = Counter(event.get("cat") for event in events)
    preempted = sum(end.usage.preemptions for end in watched.ends.values() if end.usage is not None)
    assert kinds["queue"] == len(watched.ends) + preempted
    assert kinds["prefill"] == sum(len(plan.admit) for plan in watched.executor.plans)
    assert kinds["chunk"] >= kinds["prefill"] - 5
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"seat {seat}" for seat in range(6)} <= names
    charts = {event["name"] for event in events if event["ph"] == "C"}
    assert charts == {"requests", "KV blocks", "tokens of a step"}
    reasons = [reason for event in events if event.get("cat") == "queue" for reason in event["args"]]
    assert {"seats", "the step under way"} & set(reasons)


def test_a_trace_ends_where_this_version_decides_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(journal=tmp_path / "journal")
    watched.run(traffic(6, 120))
    watched.engine.close()
    monkeypatch.setattr(Scheduler, "cancel", lambda *given: None)
    output = tmp_path / "trace.json"
    with pytest.raises(SystemExit) as done:
        main(["trace", str(tmp_path / "journal"), "-o", str(output)])
    assert not done.value.code
    assert "decides otherwise in step" in capsys.readouterr().err
    check_nesting(json.loads(output.read_text())["traceEvents"])
    with pytest.raises(SystemExit) as done:
        main(["trace", str(tmp_path / "journal"), "-o", str(tmp_path)])
    assert done.value.code == 2
    assert f"{tmp_path} cannot be written: Is a directory. Give another --output." in capsys.readouterr().err


def test_one_of_a_journal_and_a_server_has_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["trace"], ["trace", "journal", "--url", "http://127.0.0.1:1"]):
        with pytest.raises(SystemExit) as done:
            main(given)
        assert done.value.code == 2
        assert "either a journal or --url" in capsys.readouterr().err


def test_an_empty_story_is_a_trace() -> None:
    assert json.loads(json.dumps(trace([Story("nothing", [])])))["otherData"] == {"begun": 0.0}
