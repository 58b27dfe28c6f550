"""Mistakes that users make, made as they would make them, and what they are told.

What is said is kept in `mistakes/*.txt`, an entry for each: a title, what was typed or sent, the last line of the
answer, and the exit code or status. `pytest tests/errors --update` writes what is said now; read it before it is kept.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ropeway.cli.main import app, main
from ropeway.errors import BY_CODE

MISTAKES = Path(__file__).parent / "mistakes"
HOME = "/home/me"
"""Where the user stands, as the entries tell it."""

_VERBS = (
    "accept ask call check choose convert correct create do download encode finish flatten free give go install leave "
    "let log look lower make move name put quantize raise remove replay retry run save see send set shorten split "
    "start stop take try unset upgrade upload use wait write"
).replace(" ", "|")
_STEP = re.compile(
    rf"(?:^|[;:,] )(?:or |and )?(?i:{_VERBS})\b|must |together with|Did you mean|(?:lists|shows|serves) |can allow |"
    r"may use |Supported|Known are|There are|It fits on|Missing required field|expected "
)
_OPENAIS = ("Must be .jsonl", "No such File object: file-0")
"""Words of OpenAI's own, which clients may know."""

Prepare = Callable[[Path, pytest.MonkeyPatch], Mapping[str, str] | None]
"""Makes the mistake's circumstances in a directory. Returns what in the command stands for what is really typed."""


@dataclass(frozen=True)
class Typed:
    """A command line that is a mistake, with the `files` around it. Variables may stand before it, as in a shell."""

    command: str
    files: Mapping[str, str] = field(default_factory=dict)
    prepare: Prepare | None = None


@dataclass(frozen=True)
class Told:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1]


@cache
def _command() -> Any:
    """Made anew for every call, the tree of all verbs and options would take most of the time."""
    return get_command(app)


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run `ropeway` with these arguments in this process."""
    monkeypatch.setattr("ropeway.cli.main.app", _command())
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    return Told(int(end.value.code or 0), out, err)


def make(
    mistake: Typed, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, Told]:
    """Make the mistake in `folder`. Returns the entry that tells of it, and all that was said."""
    monkeypatch.chdir(folder)
    for name, text in mistake.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    real = dict((mistake.prepare(folder, monkeypatch) or {}) if mistake.prepare is not None else {})
    words = shlex.split(_replaced(mistake.command, real))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words[0] == "ropeway"
    told = run(words[1:], monkeypatch, capsys)
    said = _replaced(told.last, {value: name for name, value in real.items()})
    return f"$ {mistake.command}\n{plain(said, folder)}\nexit code {told.code}", told


def check_laws(told: Told) -> None:
    """What holds for every mistake at the command line."""
    assert "Traceback" not in told.err
    code, _, message = told.last.partition(": ")
    assert code in BY_CODE, f"the last line is no error of ours: {told.last!r}"
    assert told.code in (1, 2)
    check_words(message)


def check_words(message: str) -> None:
    """What holds for every message: whole sentences on one line, the last of which says what to do."""
    assert "\n" not in message
    if message.endswith(_OPENAIS):
        return
    assert message[-1] in ".?", f"not a sentence: {message!r}"
    assert len(message) < 500, "nobody reads that"
    last = re.split(r"(?<=[.?]) (?=[A-Z`-])", message)[-1]
    assert _STEP.search(last), f"no next step in {last!r}"


class Book:
    """The entries of one file."""

    def __init__(self, name: str) -> None:
        self.path = MISTAKES / f"{name}.txt"

    @property
    def entries(self) -> dict[str, str]:
        text = self.path.read_text() if self.path.exists() else ""
        parts = (part.partition("\n") for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:])
        return {title: entry.strip() for title, _, entry in parts}

    def check(self, title: str, entry: str, order: Sequence[str], *, update: bool) -> None:
        """`entry` is what is kept under `title`; with `update` it becomes that, and what is not in `order` goes."""
        kept = self.entries
        if update:
            kept[title] = entry
            ordered = [f"# {one}\n{kept[one]}\n" for one in order if one in kept]
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text("\n".join(ordered))
            return
        assert title in kept, f"{self.path.name} does not have it yet: pytest tests/errors --update"
        assert entry == kept[title]


def errors_of(entries: Mapping[str, str]) -> dict[str, str]:
    """The line of each entry that says what is wrong, by the title."""
    return {title: entry.splitlines()[1] for title, entry in entries.items()}


def quiet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing of whoever runs the tests has a say, and nothing of theirs is touched."""
    for name in os.environ:
        if name.startswith(("ROPEWAY_", "OPENAI_", "HF_")) and name != "ROPEWAY_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "share"))
    monkeypatch.setenv("NO_COLOR", "1")


def _replaced(text: str, words: Mapping[str, str]) -> str:
    for word, by in words.items():
        text = text.replace(word, by)
    return text


def plain(text: str, folder: Path) -> str:
    """`text` without what differs from machine to machine."""
    text = text.replace(str(folder), HOME).replace("of the control group's memory limit", "of the machine's RAM")
    text = re.sub(r"[\d.,]+ (KiB|MiB|GiB)\b", r"N \1", text)
    text = re.sub(r"(--[a-z-]+-gib|--num-kv-blocks) [\d.]+(?= or less)", r"\1 N", text)
    text = re.sub(r"\b[0-9a-f]{24,}\b", "HASH", text)
    text = re.sub(r"this one knows \d+", "this one knows N", text)
    return re.sub(r"(torch|transformers) \d+\.[\w.+]+", r"\1 N", text)
