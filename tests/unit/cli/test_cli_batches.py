"""`ropeway batches` from the terminal: waiting for an end, what is listed, and files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clikit import answering, reply, run, terminal

from ropeway.cli import batches

LINE = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}})


def batch(status: str = "completed", total: int = 3, completed: int = 0, failed: int = 0, **more: Any) -> bytes:
    counts = {"total": total, "completed": completed, "failed": failed}
    made = {"id": "batch_1", "object": "batch", "endpoint": "/v1/embeddings", "status": status, "output_file_id": None}
    return reply(json.dumps({**made, "error_file_id": None, "request_counts": counts, **more}))


def listed(has_more: bool) -> bytes:
    [one] = [json.loads(batch("in_progress", 7, 2, 1).partition(b"\r\n\r\n")[2])]
    return reply(json.dumps({"object": "list", "data": [one], "has_more": has_more}))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batches, "_LOOK_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)


def test_waiting_looks_until_the_end_and_counts_on_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many requests there are is known once the file has been read."""
    steps = [
        batch("validating", 0), batch("validating", 0), batch("in_progress", 3, 1), batch("finalizing", 3, 2, 1),
        batch("completed", 3, 2, 1),
    ]  # fmt: skip
    with answering(*steps) as server, terminal(monkeypatch, "stderr") as seen:
        code, out, _ = run(capsys, "batches", "get", "batch_1", "--wait", "--url", server.url)
    assert server.heard == ["GET /v1/batches/batch_1"] * 5
    assert (code, "completed" in out) == (0, True)
    assert "3/3 requests" in seen.text


def test_a_batch_that_fails_before_anything_is_counted_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text("\n" + LINE)
    errors = {"data": [{"line": n, "code": "wrong", "message": f"It is {n}."} for n in range(1, 14)]}
    uploaded = reply(json.dumps({"id": "file_1"}))
    with answering(uploaded, batch("validating", 0), batch("failed", 0, errors=errors)) as server:
        code, out, err = run(capsys, "batches", "create", "in.jsonl", "--wait", "--url", server.url)
    assert code == 0
    assert "line 10: wrong: It is 10." in out
    assert "It is 11." not in out
    assert "3 more errors; see --json." in err


def test_a_list_says_that_there_are_more(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(listed(True), listed(False), listed(True)) as server:
        _, out, err = run(capsys, "batches", "list", "--url", server.url)
        assert out.splitlines()[1].split() == ["batch_1", "in_progress", "2", "1", "7", "/v1/embeddings"]
        assert "--limit" in err
        assert run(capsys, "batches", "list", "--url", server.url)[2] == ""
        _, out, _ = run(capsys, "batches", "list", "--json", "--url", server.url)
    assert json.loads(out)["has_more"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "in.jsonl cannot be read: No such file"),
        ("", "names no url. Give --endpoint."),
        ("{", "names no url"),
        ("[]", "names no url"),
        ('{"custom_id": "a"}\n' + LINE, "names no url"),
        ("\xff", "names no url"),
    ],
)
def test_a_file_that_does_not_say_where_its_requests_go(
    content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("in.jsonl").write_text(content, encoding="latin-1")
    code, _, err = run(capsys, "batches", "create", "in.jsonl")
    assert (code, said in err) == (2, True)


def test_a_file_that_cannot_be_read_is_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "batches", "create", "in.jsonl", "--endpoint", "/v1/completions")
    assert (code, "in.jsonl cannot be read: No such file" in err) == (2, True)


def test_output_that_is_not_there_or_has_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("batches", "output", "batch_1", "--url")
    with answering(batch("in_progress"), batch(), batch(output_file_id="file_1")) as server:
        assert "is in_progress and has no answers" in run(capsys, *words, server.url)[2]
        assert "is completed and has no errors" in run(capsys, *words, server.url, "--errors")[2]
        code, _, err = run(capsys, *words, server.url, "-o", "no/such/file")
    assert (code, "no/such/file cannot be written: No such file" in err) == (2, True)
