"""The soak's own judgement: whatever a client makes of an answer that it cannot understand counts as wrong."""

from __future__ import annotations

import random
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

EVIDENCE = Path(__file__).parents[3] / "benchmarks/evidence"


async def test_an_answer_that_is_no_json_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVIDENCE)
    spec = spec_from_file_location("evidence_soak", EVIDENCE / "soak.py")  # another module of the tests is called soak
    assert spec is not None
    assert spec.loader is not None
    soak = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evidence_soak", soak)
    spec.loader.exec_module(soak)

    async def ride(client: Any, pick: random.Random) -> None:
        import passengers

        passengers._trip('{"city": ')

    monkeypatch.setattr(soak, "KINDS", {"structured": soak.BACKGROUND.__class__(1.0, "", ride)})
    found = soak.Ride(time.monotonic())
    await soak.load(None, found, 400.0, 0.1, random.Random(1))
    assert set(found.ended) == {("structured", "wrong")}
    assert len(found.wrong) == found.ended.total() > 10
    assert "JSONDecodeError" in found.wrong[0]
