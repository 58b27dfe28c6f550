"""The conversation in the terminal, with a scripted server."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator
from typing import Any

import pytest
from clikit import terminal
from rich.console import Console

from ropeway.bench.wire import Chunk, ChunkUsage
from ropeway.cli.client import Client, Timing
from ropeway.cli.repl import ChatSession, CompletionSession, converse
from ropeway.errors import RequestError


class ScriptedClient(Client):
    """Yields the next scripted answer; an exception in it is raised at its place."""

    def __init__(self, *answers: list[str | BaseException]) -> None:
        super().__init__("http://127.0.0.1:1", model="scripted")
        self.answers = list(answers)
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.closed = 0

    def stream(self, path: str, fields: dict[str, Any], timing: Timing) -> Generator[str, None, None]:
        self.sent.append((path, fields))
        try:
            for number, part in enumerate(self.answers.pop(0), 1):
                if isinstance(part, BaseException):
                    raise part
                timing.note(Chunk(usage=ChunkUsage(3, number)), number)
                yield part
        finally:
            self.closed += 1


def chat(client: ScriptedClient, **options: Any) -> tuple[ChatSession, io.StringIO]:
    out = io.StringIO()
    return ChatSession(client, options, console=Console(file=out, width=200, highlight=False)), out


def talk(monkeypatch: pytest.MonkeyPatch, session: Any, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    converse(session)


def test_every_turn_sends_all_turns_before(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ScriptedClient(["Hel", "lo!"], ["Fine."], ["New."])
    session, out = chat(client, temperature=0.5)
    talk(monkeypatch, session, "Hi", "How are you?", "/reset", "Who?", "/quit", "never sent")
    assert [path for path, _ in client.sent] == ["/v1/chat/completions"] * 3
    assert client.sent[1][1] == {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "How are you?"},
        ],
        "temperature": 0.5,
    }
    assert client.sent[2][1]["messages"] == [{"role": "user", "content": "Who?"}]
    assert out.getvalue().splitlines() == ["Hello!", "Fine.", "New conversation.", "New."]


def test_system_message_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ScriptedClient(["a"], ["b"])
    session, _ = chat(client)
    talk(monkeypatch, session, "one", "/system Be brief.", "two")
    assert client.sent[1][1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two"},
    ]


def test_interrupt_ends_the_answer_and_keeps_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ScriptedClient(["The cable", KeyboardInterrupt()], ["ok"])
    session, out = chat(client)
    talk(monkeypatch, session, "Tell me", "more", "/stats")
    assert client.sent[1][1]["messages"][1] == {"role": "assistant", "content": "The cable"}
    assert client.closed == 2
    assert "(stopped)" in out.getvalue()
    assert "3 tokens in, 1 out" in out.getvalue()


def test_closing_mid_answer_closes_the_stream() -> None:
    client = ScriptedClient(["a", "b", RequestError("late")])
    session, out = chat(client)
    with pytest.raises(RequestError):
        session.ask("x")
    assert client.closed == 1
    assert session.last is None
    assert out.getvalue() == "ab"


def test_a_script_stops_at_an_error_and_a_person_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = chat(ScriptedClient([RequestError("too long")], ["fine"]))
    with pytest.raises(RequestError):
        talk(monkeypatch, session, "x", "y")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    session, out = chat(ScriptedClient([RequestError("too long")], ["fine"]))
    monkeypatch.setattr(sys, "stdin", Terminal("x\ny\n"))
    monkeypatch.setattr("builtins.input", lambda _="": sys.stdin.readline().strip() or (_ for _ in ()).throw(EOFError))
    converse(session)
    assert "RW-REQ: too long" in out.getvalue()
    assert "fine" in out.getvalue()


def test_texts_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    session, out = chat(ScriptedClient(["[bold]not markup[/bold] :smile: "]))
    talk(monkeypatch, session, "x")
    assert out.getvalue() == "[bold]not markup[/bold] :smile: \n"


def test_completions_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ScriptedClient([" time"], [" end"])
    out = io.StringIO()
    session = CompletionSession(client, {"max_tokens": 4}, Console(file=out))
    talk(monkeypatch, session, "Once upon a", "/help", "/nope", "The", "/stats")
    assert client.sent == [
        ("/v1/completions", {"prompt": "Once upon a", "max_tokens": 4}),
        ("/v1/completions", {"prompt": "The", "max_tokens": 4}),
    ]
    assert "No command /nope" in out.getvalue()
    assert "/system" not in out.getvalue()


def test_rate_counts_tokens_after_the_first() -> None:
    timing = Timing(ttft=0.5, last=2.5, tokens=11, prompt_tokens=4)
    assert timing.rate == 5.0
    assert str(timing) == "4 tokens in, 11 out, first after 500 ms, then 5.0 tokens/s"
    assert Timing(tokens=1, ttft=1.0, last=1.0).rate == 0.0


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([KeyboardInterrupt, "x", EOFError])

    def read(_: str) -> str:
        found = next(typed)
        if isinstance(found, str):
            return found
        raise found

    session, out = chat(ScriptedClient(["fine"]))
    monkeypatch.setattr("builtins.input", read)
    converse(session)
    assert out.getvalue().split("\n") == ["", "(/quit or Ctrl-D leaves)", "fine", ""]


def test_a_terminal_shows_the_timing_after_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, "stdout") as seen:
        CompletionSession(ScriptedClient(["a", "b"]), {}).ask("x")
    assert seen.text.splitlines()[0] == "ab"
    assert "3 tokens in, 2 out" in seen.text.splitlines()[1]
