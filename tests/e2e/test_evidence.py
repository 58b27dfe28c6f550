"""The evidence can be made: every experiment runs, on a small scale, and every claim finds its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_experiment_runs_and_every_claim_has_its_figure(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/evidence", "--quick", "--models", "bundled", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, run.stderr
    summary, page = (tmp_path / "index.md").read_text(), (tmp_path / "bundled.md").read_text()
    assert "not run" not in summary
    assert "--quick" in summary
    figures = json.loads((tmp_path / "figures.json").read_text())["models"]["bundled"]
    assert figures["bound"] == pytest.approx(2000 / 850)  # of one group of four as of all
    assert figures["occupancy_static"] == pytest.approx(1 / figures["bound"], abs=0.02)
    assert figures["occupancy_static"] < 0.8 * figures["occupancy_continuous"] < 0.8
    for name in ("lengths", "seats", "chunks"):
        [picture] = tmp_path.glob(f"bundled-*-{name}.png")
        assert picture.name in page
