"""Every verb there is explains itself and all of its options, and the documentation knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ropeway.cli.main import app, main

DOCS = Path(__file__).parents[3] / "docs"


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands under `command`, groups included, with the words that lead there."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*path, name))


ALL = dict(verbs(get_command(app)))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_names_all_that_can_be_given(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    command = ALL[words]
    assert command.help, "a verb that does not explain itself"
    assert command.help.split("\n")[0].split(".")[0][:40] in shown
    assert all(f" {name} " in shown for name in getattr(command, "commands", {}))
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    assert all(option.opts[0] in shown for option in options)
    assert all(option.help for option in options), "an option without help"


def test_the_table_of_commands_is_complete() -> None:
    page = (DOCS / "cli.md").read_text()
    first = {words[0] for words in ALL if words}
    assert {verb for verb in first if f"| `ropeway {verb}" not in page} == set()
