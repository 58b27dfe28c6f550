"""The benchmark for GPUs: all of it on tiny shapes and a CPU, what it does when time or a worker gives out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from programs import program

layouts, run, tables, tracing = (
    program(f"benchmarks/gpu/{name}.py") for name in ("layouts", "run", "tables", "tracing")
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_part_runs_on_tiny_shapes(tmp_path: Path) -> None:
    words = [sys.executable, str(run.__file__), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=380, check=False)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    status = found["status"]
    assert set(status) == set(tables.PARTS_SHOWN)
    assert {part for part in status if status[part] != "done"} <= {"fp8"}, done.stderr[-3000:]
    assert status["fp8"] == "done" or status["fp8"].startswith("not here: "), "a CPU may say that it has no fp8"
    assert done.returncode == 0
    rows: dict[str, list[dict[str, Any]]] = found["rows"]
    assert [row["rows"] for row in rows["decode"]] == list(layouts.TINY.batches)
    assert all(row["tokens_s"] > 0 and 0 <= row["idle"] <= 1 and row["of_read"] > 0 for row in rows["decode"])
    assert all(row["context"] >= layouts.TINY.context for row in rows["decode"])
    asked = sum(ask.output for ask in layouts.mix(layouts.TINY, layouts.TINY.compared, 512, layouts.TINY.compared))
    same = [rows[part][0] for part in ("offline", "continuous", "static")]
    assert [row["output_tokens"] for row in same] == [asked] * 3
    text = path.with_suffix(".md").read_text()
    assert text == tables.markdown(found)
    assert "no figure here means anything" in text
    for title, _ in tables.PARTS_SHOWN.values():
        assert f"## {title}\n" in text


def test_the_yardstick_is_the_one_that_others_use() -> None:
    """133,966 tokens of output are what nano-vllm and mini-sglang publish for it."""
    asks = layouts.yardstick(layouts.FULL, 151936)
    assert len(asks) == 256
    assert sum(ask.output for ask in asks) == 133966
    assert all(100 <= len(ask.prompt) <= 1024 and max(ask.prompt) <= 10000 for ask in asks)


def test_a_worker_that_dies_costs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part it died of is told as failed, and another worker does what is left."""
    asked: list[str] = []

    def watch(words: list[str], path: Path, until: float) -> int:
        names = words[words.index("--only") + 1].split(",")
        asked.append(",".join(names))
        journal = run.Journal(path)
        for name in names:
            journal.write(kind="begun", part=name, end=until)
            if name == "decode":
                return -11
            journal.write(kind="row", part=name, row={"rows": 1})
            journal.write(kind="ended", part=name, status="done", seconds=1.0)
        return 0

    monkeypatch.setattr(run, "_watch", watch)
    options = run.parser().parse_args(["--device", "cpu", "--tiny"])
    path = tmp_path / "lines"
    run._conduct(options, ["ceilings", "decode", "prefill", "tiers"], path, 1e12)
    found = run.collect(run.read(path))
    assert asked == ["ceilings,decode,prefill,tiers", "prefill,tiers"]
    assert found["status"] == {
        "ceilings": "done",
        "decode": "failed: exit status -11",
        "prefill": "done",
        "tiers": "done",
    }
    assert list(found["rows"]) == ["ceilings", "prefill", "tiers"]


def test_parts_that_no_worker_reached_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(words: list[str], path: Path, until: float) -> int:
        run.Journal(path).write(kind="ended", part="ceilings", status="done", seconds=1.0)
        return 1

    monkeypatch.setattr(run, "_watch", watch)
    path = tmp_path / "lines"
    run._conduct(run.parser().parse_args([]), ["ceilings", "decode"], path, 1e12)
    assert run.collect(run.read(path))["status"] == {"ceilings": "done", "decode": "not reached"}


def test_there_is_no_share_of_a_rate_that_was_not_measured(tmp_path: Path) -> None:
    parts = program("benchmarks/gpu/parts.py")
    bench = parts.Bench(torch.device("cpu"), layouts.TINY, tmp_path)
    (row,) = parts.online_part(bench, None)
    assert set(row) == {"lacks"}


def test_a_part_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE", 0.0)
    path = tmp_path / "lines"
    run.Journal(path).write(kind="begun", part="decode", end=0.0)
    assert run._watch([sys.executable, "-c", "import time; time.sleep(100)"], path, 1e12) == -9


def test_idle_time_on_a_device_is_told_apart() -> None:
    """Two steps of two kernels, 2 us between them, one overlapped by a copy; 30 us from one step to the next."""
    spans = [
        tracing.Span(n, b, e) for n, b, e in (("a", 0, 10), ("b", 12, 20), ("a", 50, 60), ("c", 55, 58), ("b", 62, 70))
    ]
    found = tracing.idle_of(spans)
    assert found["idle_within"] == pytest.approx(4 / 70)
    assert found["idle_between"] == pytest.approx(30 / 70)
    assert (found["gap_us"], found["longest_gap_us"]) == (30, 30)
    first, *_ = tracing.kernels(spans, 2, 0.0)
    assert (first["kernel"], first["calls"], first["us"]) == ("a", 1.0, 10.0)


def test_what_matters_least_is_dropped_first() -> None:
    parts = program("benchmarks/gpu/parts.py")
    assert {part.name for part in parts.PARTS} == set(tables.PARTS_SHOWN)
    some = [parts.Part(name, weight, seconds, parts.start_part) for name, weight, seconds in
            (("late", 3, 4.0), ("first", 0, 10.0), ("large", 2, 10.0), ("second", 1, 10.0))]  # fmt: skip
    assert parts.affordable(some, 34.0) == {"first", "second", "large", "late"}
    assert parts.affordable(some, 25.0) == {"first", "second", "late"}
    assert parts.affordable(some, 9.0) == {"late"}
    assert parts.affordable(some, 3.0) == set()
