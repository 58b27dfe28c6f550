"""What commands meet: a server with scripted answers, a terminal, and programs that are not really there."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ropeway.cli.main import app, main

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

Answer = bytes | Callable[[socket.socket], None]


@cache
def _command() -> Any:
    """Made anew for every call, the tree of all verbs and options would take most of the time."""
    return get_command(app)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output, errors of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropeway.cli.main.app", _command())
        with pytest.raises(SystemExit) as end:
            main(words)
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


def reply(body: str, status: str = "200 OK", missing: int = 0) -> bytes:
    """An answer whose connection ends `missing` bytes before its body does."""
    data = body.encode()
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(data) + missing}\r\n\r\n"
    return head.encode() + data


class Scripted:
    """A server that gives each of `answers` to one connection. `heard` has the first line of each request."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self.heard: list[str] = []
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(60)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with self._listener:
            for answer in self._answers:
                connection, _ = self._listener.accept()
                with connection, suppress(ConnectionError):
                    self._hear(connection)
                    if callable(answer):
                        answer(connection)
                    else:
                        connection.sendall(answer)

    def _hear(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        self.heard.append(head.split(b" HTTP")[0].decode())
        for line in head.lower().splitlines():
            if line.startswith(b"content-length:"):
                while len(body) < int(line.split(b":")[1]):
                    body += connection.recv(65536)
        if b"transfer-encoding: chunked" in head.lower():
            while not body.endswith(b"0\r\n\r\n"):
                body += connection.recv(65536)


@contextmanager
def answering(*answers: Answer) -> Iterator[Scripted]:
    """Such a server, all of whose answers are asked for."""
    server = Scripted(answers)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    thread.join(60)
    assert len(server.heard) == len(answers), server.heard


def interrupt() -> None:
    """Ctrl-C, as the command in the main thread meets it."""
    thread = threading.main_thread().ident
    assert thread is not None
    signal.pthread_kill(thread, signal.SIGINT)


class Screen:
    """What a terminal has been shown."""

    def __init__(self) -> None:
        self._sent = bytearray()

    @property
    def text(self) -> str:
        """Without what moves and colours it."""
        return _CONTROL.sub("", self._sent.decode("utf-8", "ignore"))

    def watch(self, keyboard: int) -> None:
        with suppress(OSError):  # which says that the other side is closed
            while data := os.read(keyboard, 4096):
                self._sent.extend(data)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Screen]:
    """sys.stdout or sys.stderr, by `name`, is a terminal of 100 by 30. All is there after the context."""
    for variable, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    keyboard, line = pty.openpty()
    screen = Screen()
    watcher = threading.Thread(target=screen.watch, args=(keyboard,), daemon=True)
    watcher.start()
    try:
        with os.fdopen(line, "w", encoding="utf-8") as file, monkeypatch.context() as patch:
            patch.setattr(f"sys.{name}", file)
            yield screen
        watcher.join(60)
    finally:
        os.close(keyboard)


def program(folder: Path, name: str, text: str) -> Path:
    """A shell script that can be called by its name where `folder` is on the PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
