"""`ropeway requests` and `ropeway trace` of a server that says more than they show, or that there is more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clikit import answering, reply, run

USAGE = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens": 5}
ONE = {"id": "req-1", "state": "queued", "seconds": 1.5, "usage": USAGE, "reason": "all seats are taken", "model": "m"}


def listed(has_more: bool) -> bytes:
    return reply(json.dumps({"object": "list", "data": [{**ONE, "timeline": None}], "has_more": has_more}))


def test_a_list_says_that_there_are_more(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(listed(True), listed(False), listed(False)) as server:
        _, out, err = run(capsys, "requests", "list", "--url", server.url)
        assert out.splitlines()[1].split() == ["req-1", "queued", "1.50", "7", "3", "5", *str(ONE["reason"]).split()]
        assert err == "There are more; see --limit.\n"
        assert run(capsys, "requests", "list", "--url", server.url)[2] == ""
        _, out, _ = run(capsys, "requests", "list", "--state", "queued", "--json", "--url", server.url)
    assert json.loads(out)["data"][0]["usage"] == USAGE


def test_a_trace_says_that_older_requests_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(listed(True)) as server:
        code, out, err = run(capsys, "trace", "--url", server.url, "-o", str(tmp_path / "t.json"))
    assert (code, "those are left out" in err) == (0, True)
    assert out.startswith("0 requests")
