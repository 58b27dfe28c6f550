"""What users are told when the server at the other end refuses, breaks off, or is none of the kind that they think."""

from __future__ import annotations

import io
import json
import socket
import sys
from pathlib import Path

import pytest
from clikit import Answer, answering, interrupt, reply, run

from waiting import until

BATCH = reply(json.dumps({"output_file_id": "file_1", "error_file_id": None, "status": "completed"}))
PAGE = reply("<html>Log in</html>")
REFUSAL = json.dumps({"error": {"message": "It is too large."}})
CHAT = ("chat", "--quick", "hi", "--model", "m")
CREATE = ("batches", "create", "in.jsonl", "--endpoint", "/v1/completions")
OUTPUT = ("batches", "output", "batch_1", "-o", "out.jsonl")
HUNG_UP = "No server answers at"


def chunks(*texts: str, missing: int = 0) -> bytes:
    return reply("".join(f"data: {text}\n\n" for text in texts), missing=missing)


def text(content: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": content}}]})


@pytest.mark.parametrize(
    ("words", "answers", "said"),
    [
        (("chat", "--quick", "hi"), [PAGE], "/v1/models does not answer with JSON: is this an OpenAI server?"),
        (("chat", "--quick", "hi"), [reply('{"data": []}')], "has no model list: is this an OpenAI server?"),
        (("requests", "list"), [PAGE], "does not answer with JSON"),
        (CREATE, [PAGE], "/v1/files does not answer with JSON"),
        (CHAT, [chunks(text("Hel"), "{")], "RW-REQ: The server sent a chunk that is not valid"),
        (("top", "--once"), [chunks("{")], "RW-REQ: The server sent a chunk that is not valid"),
        (CHAT, [chunks(text("Hel"), '{"error": {"message": "The engine died."}}')], "RW-REQ: The engine died."),
        (CHAT, [chunks(text("Hel"), '{"error": "died"}')], "RW-REQ: died"),
        (CHAT, [reply("", "401 X")], "RW-CFG:  Give the key with --api-key or ROPEWAY_API_KEY."),
        (CHAT, [reply(REFUSAL, "413 X")], "RW-REQ: HTTP 413: It is too large."),
        (CHAT, [reply("Bad \xff gateway", "502 X")], "RW-REQ: HTTP 502: Bad \xff gateway"),
        (CREATE, [reply(REFUSAL, "413 X")], "RW-REQ: HTTP 413: It is too large."),
        (OUTPUT, [BATCH, reply(REFUSAL, "404 X")], "RW-REQ: HTTP 404: It is too large."),
        (("top",), [reply(REFUSAL, "403 X")], "RW-REQ: HTTP 403: It is too large."),
        (("requests", "list"), [reply("{}", missing=1)], HUNG_UP),
        (CHAT, [chunks(text("Hel"), missing=9)], HUNG_UP),
        (CREATE, [b""], HUNG_UP),
        (OUTPUT, [BATCH, reply("{}\n", missing=9)], HUNG_UP),
        (("top",), [chunks(missing=9)], HUNG_UP),
    ],
)
def test_the_last_line_says_what_is_wrong_with_a_server(
    words: tuple[str, ...],
    answers: list[Answer],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("{}\n")
    with answering(*answers) as server:
        code, _, err = run(capsys, *words, "--url", server.url)
    last = err.splitlines()[-1]
    assert said in last
    assert code == (1 if last.startswith("RW-REQ") else 2)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:x", "http://127.0.0.1:80000", "http://127.0.0..1", "http://"]
)
@pytest.mark.parametrize("words", [("chat", "--quick", "hi", "--url"), ("bench", "serve", "--base-url")])
def test_an_address_that_cannot_be_asked_is_refused(
    words: tuple[str, ...], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *words, url)
    assert (code, f"is not an http:// or https:// address. Check {words[-1]}." in err) == (2, True)


@pytest.mark.parametrize("key", ["cl\xe9", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "chat", "--quick", "hi", "--api-key", key)
    assert (code, "cannot be sent" in err, key in err) == (2, True, False)


def test_what_came_of_an_answer_before_it_broke_off_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(chunks(text("Hel"), text("lo"), missing=9)) as server:
        code, out, err = run(capsys, *CHAT, "--url", server.url)
    assert (code, out) == (2, "Hello")
    assert "Start one in another terminal" in err


def test_ctrl_c_ends_an_answer_and_its_connection(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --quick nothing was answered then, which a script can tell by the exit code."""

    def interrupted(connection: socket.socket) -> None:
        connection.sendall(chunks(text("Hel"), missing=9))
        until(lambda: "Hel" in shown.getvalue())
        interrupt()
        assert connection.recv(1) == b"", "the client has gone"

    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with answering(interrupted) as server:
        code, _, _ = run(capsys, *CHAT, "--url", server.url)
    assert (code, shown.getvalue()) == (1, "Hel (stopped)\n")
