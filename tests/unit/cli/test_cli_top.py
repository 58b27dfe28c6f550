"""What `ropeway top` shows of a frame."""

from __future__ import annotations

import io
import json
import socket
from typing import Any

import pytest
from clikit import answering, interrupt, reply, run, terminal
from rich.console import Console

from ropeway.cli.top import view
from waiting import until

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


def events(*found: dict[str, Any], missing: int = 0) -> bytes:
    return reply("".join(f"data: {json.dumps(one)}\n\n" for one in found), missing=missing)


def test_the_newest_frame_is_on_the_terminal_until_the_server_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        answering(events(HELLO, frame(step=7), frame(step=8, seats=40))) as server,
        terminal(monkeypatch, "stdout") as seen,
    ):
        code, _, err = run(capsys, "top", "--every", "2", "--url", server.url)
    assert server.heard == ["GET /ui/feed?every=2.0"]
    assert (code, err) == (0, "The server has ended the feed.\n")
    first, second = seen.text.index("step 7"), seen.text.index("step 8")
    assert first < second
    assert "more" in seen.text[second:], "forty seats do not fit into thirty lines"


def test_ctrl_c_leaves_without_a_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(connection: socket.socket) -> None:
        connection.sendall(events(HELLO, frame(), missing=9))
        until(lambda: "step 1,234" in seen.text)
        interrupt()
        assert connection.recv(1) == b"", "the client has gone"

    with answering(interrupted) as server, terminal(monkeypatch, "stdout") as seen:
        code, _, err = run(capsys, "top", "--url", server.url)
    assert (code, err) == (0, "")


def test_a_model_that_is_no_longer_served_is_no_longer_shown(capsys: pytest.CaptureFixture[str]) -> None:
    alone = {**HELLO, "engines": [ENGINE]}
    with answering(events(HELLO, frame(model="other"), frame(), alone, frame(step=9))) as server:
        _, out, _ = run(capsys, "top", "--once", "--url", server.url)
    assert "step 9" in out
    assert "other" not in out
