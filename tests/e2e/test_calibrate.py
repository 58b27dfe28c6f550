"""A machine is measured with a real model behind a real server, and what was measured is simulated."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from ropeway.cli import run_calibrate
from ropeway.cli.main import main
from ropeway.sim.calibrate import measure
from ropeway.sim.profile import load_profile

SEATS, SECONDS = 4, 1.0
SETTINGS = ("--threads", "1", "--max-num-seqs", str(SEATS), "--max-num-batched-tokens", "128", "--max-model-len", "256")


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_calibrate, "measure", partial(measure, seconds=SECONDS))
    monkeypatch.setattr(run_calibrate, "PATIENCE", SECONDS)


def test_a_machine_is_measured_and_simulated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone, served, simulated = (tmp_path / name for name in ("alone.json", "served.json", "simulated.json"))
    run("calibrate", *SETTINGS, "--num-kv-blocks", "64", "--no-serve", "--name", "still", "--output", str(alone))
    run("calibrate", *SETTINGS, "--num-kv-blocks", "64", "--price-per-hour", "2", "--output", str(served))
    told = capfd.readouterr()
    assert told.err.count("kinds of steps") == 2
    pattern = r"^ {4}(at .*): TTFT ([\d.]+) and ([\d.]+), ITL .*, E2EL ([\d.]+) and ([\d.]+)$"
    levels = re.findall(pattern, told.out, re.MULTILINE)
    assert [level[0] for level in levels] == ["at a quarter of what it can do", "at half of what it can do"]
    assert all(float(figure) > 0 for level in levels for figure in level[1:])
    for part in ("on its way in", "while the engine is at work", "to begin", "between steps", "after its step"):
        assert part in told.out

    still, whole = load_profile(str(alone)), load_profile(str(served))
    assert (still.name, whole.name) == ("still", "served")
    for profile in (still, whole):
        assert (profile.basis, profile.threads, profile.kv_tokens) == ("measured", 1, 64 * 16)
        one, many = profile.cost.of(1, 0, 1), profile.cost.of(SEATS, 100 * SEATS, SEATS)
        prompt = profile.cost.of(128, 128, 1, 128 * 129 // 2, 1)
        assert 0 < one <= many, "more work takes longer"
        assert one < prompt, "more work takes longer"
    assert (still.price_per_hour, whole.price_per_hour) == (None, 2)
    assert still.serving.request == still.serving.deliver == 0 < still.serving.step, "of a server nothing is known"
    added = whole.serving
    assert added.request + added.arrive + added.deliver > 0, "a client is never where the engine is"
    assert re.match(r"[\d,]+ steps of a server, and \d+ kinds of steps", whole.note)

    asked = ("--num-requests", "50", "--load", "0.5", "--length-scale", "0.1", "--max-num-seqs", str(SEATS))
    run("sim", "--profile", str(served), *asked, "--output-json", str(simulated))
    assert "served: bundled bfloat16" in capfd.readouterr().out
    [found] = json.loads(simulated.read_text(encoding="utf-8"))
    assert (found["finished"], found["profile"]) == (50, "served")
