"""Reading questions and streaming answers in a terminal."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console

from ropeway.cli.client import Client, Timing
from ropeway.errors import RopewayError


class Session(ABC):
    """Asks, prints while the answer arrives, keeps the last timing. Subclasses say what is sent and remembered."""

    path = ""
    prompt = "> "

    def __init__(self, client: Client, options: dict[str, Any], console: Console | None = None) -> None:
        self.client = client
        self.options = options
        self.console = console or Console(highlight=False)
        self.last: Timing | None = None
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("show this list", self._help),
            "/stats": ("timing of the last answer", self._stats),
        }

    @abstractmethod
    def fields(self, text: str) -> dict[str, Any]:
        """Those of the request that asks `text`."""

    @abstractmethod
    def remember(self, text: str, answer: str) -> None:
        """Called with every answer, also one that was stopped half-way."""

    def ask(self, text: str) -> None:
        """Send `text` and print the answer. Ctrl-C ends the answer; the server then frees its seat."""
        timing, parts, complete = Timing(), [], False
        stream = self.client.stream(self.path, {**self.fields(text), **self.options}, timing)
        try:
            for part in stream:
                parts.append(part)
                self.console.print(part, end="", markup=False, emoji=False, soft_wrap=True)
                self.console.file.flush()
            complete = True
        except KeyboardInterrupt:
            self.console.print(" [dim](stopped)[/dim]", end="")
        finally:
            stream.close()
            if parts:
                self.remember(text, "".join(parts))
        self.console.print()
        if complete:
            self.last = timing
            if self.console.is_terminal:
                self.console.print(f"[dim]{timing}[/dim]")

    def _help(self, _: str) -> None:
        for name, (what, _action) in self.commands.items():
            self.console.print(f"  {name:<16} {what}", markup=False)
        self.console.print("  /quit            leave (so does Ctrl-D); Ctrl-C stops an answer", markup=False)

    def _stats(self, _: str) -> None:
        self.console.print(str(self.last) if self.last else "No answer yet.")


class ChatSession(Session):
    """A conversation: every turn sends all turns before it."""

    path = "/v1/chat/completions"

    def __init__(
        self, client: Client, options: dict[str, Any], *, system: str | None = None, console: Console | None = None
    ) -> None:
        super().__init__(client, options, console)
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.commands |= {
            "/system": ("TEXT: set the system message and start again", self._set_system),
            "/reset": ("forget the conversation", self._reset),
        }

    def fields(self, text: str) -> dict[str, Any]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*opening, *self.turns, {"role": "user", "content": text}]}

    def remember(self, text: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._reset("")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self.console.print("[dim]New conversation.[/dim]")


class CompletionSession(Session):
    """Texts to continue; each stands alone."""

    path = "/v1/completions"

    def fields(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def remember(self, text: str, answer: str) -> None:
        return None


def converse(session: Session) -> None:
    """Read and answer until /quit or the end of input. An error of one turn is printed and the talk goes on."""
    with suppress(ImportError):
        import readline  # noqa: F401  (its import alone gives input() editing and history)
    interactive = sys.stdin.isatty()
    if interactive:
        session.console.print(f"[bold]{session.client.model}[/bold] at {session.client.url}. /help lists commands.")
    while True:
        try:
            line = input(session.prompt if interactive else "").strip()
        except EOFError:
            if interactive:
                session.console.print()
            return
        except KeyboardInterrupt:
            session.console.print("\n[dim](/quit or Ctrl-D leaves)[/dim]")
            continue
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return
        if name.startswith("/"):
            known = session.commands.get(name)
            if known is None:
                session.console.print(f"No command {name}. /help lists them.", markup=False)
            else:
                known[1](rest.strip())
        elif line:
            try:
                session.ask(line)
            except RopewayError as error:
                session.console.print(f"\n{error.code}: {error.message}", markup=False, emoji=False, style="red")
                if not interactive:
                    raise
