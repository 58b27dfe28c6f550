"""What `ropeway top` shows of a frame."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ropeway.cli.top import view

ENGINE = {"model": "m", "device": "cpu", "slots": 8, "block_size": 16, "max_model_len": 64}
HELLO = {"version": "1", "engines": [ENGINE, {**ENGINE, "model": "other", "slots": 2}], "operator": True}


def frame(seats: int = 3, waiting: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "t": 1.0, "step": 1234, "model": "m", "state": "ready", "waiting_total": waiting,
        "seats": [
            {
                "slot": slot, "id": f"req-{slot}", "urgency": "high", "prompt": 10, "computed": 5 * slot, "known": 20,
                "cached": 0, "count": 1, "phase": "decode" if slot else "prefill", "blocks": 2,
            }
            for slot in range(seats)
        ],
        "waiting": [
            {
                "id": f"late-{place}", "position": place, "urgency": "low", "holder": "seats",
                "reason": "all seats are taken", "eta_s": None if place else 1.25,
            }
            for place in range(waiting)
        ],
        "kv": {
            "total": 100, "used": 25, "cached": 30, "cells": "", "tiers": [{"name": "host", "blocks": 9, "used": 4}]
        },
        "rates": {
            "prompt_tps": 1500.0, "generation_tps": None, "ttft_p50": 0.25, "ttft_p99": None, "itl_p50": 0.0125,
            "itl_p99": 0.02,
        },
        "events": [], **changes,
    }  # fmt: skip


def shown(height: int | None = None, **changes: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view(HELLO, [frame(**changes)], height))
    return console.export_text()


def test_all_is_there() -> None:
    text = shown()
    for part in (
        "m on cpu, ready, step 1,234", "3 of 8", "25 of 100 blocks, 30 remembered", "host 4/9", "prompt 1,500 tokens/s",
        "answers - tokens/s", "first token 250 ms (p99 -)", "req-2", "2 waiting", "late-1", "1.2 s",
        "seats: all seats are taken",
    ):  # fmt: skip
        assert part in text, text


@pytest.mark.parametrize("height", [24, 50])
def test_a_small_terminal_shows_what_fits(height: int) -> None:
    text = shown(height, seats=200, waiting=50)
    assert "more" in text
    assert len(text.splitlines()) <= height


def test_each_model_has_its_own_seats() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view(HELLO, [frame(), frame(seats=2, model="other")]))
    text = console.export_text()
    assert "3 of 8" in text
    assert "2 of 2" in text


def test_nobody_there() -> None:
    assert "0 waiting" in shown(seats=0, waiting=0)
