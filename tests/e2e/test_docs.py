"""The documentation is run: every block of Python and of commands, against a real server of the bundled model.

Each block of a page names its language. `sh` is run as a script, of `console` the lines behind a `$`, and the `python`
blocks of a page share their names, as for a reader who types them one after the other. A comment before a block,
`<!-- not run: why -->`, keeps it from being run; its commands must exist all the same. `<!-- server: --option -->` on a
page starts a server with these options for it. The address http://127.0.0.1:8000 becomes that of the server.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from running import ADMIN, Server, serving
from typer.main import get_command

from pages import PAGES, ROOT, blocks, flags_of
from ropeway.cli.main import app

RUN, SHOWN = {"python", "sh", "console"}, {"text", "json", "yaml", "mermaid", "jinja", "lark", "http"}

_ADDRESS = re.compile(r"(?:127\.0\.0\.1|localhost):8000")
_CLIENTS = re.compile(r"\bropeway (chat|complete|requests \w+|batches \w+|canary \w+)\b")


@pytest.fixture(scope="module")
def server_for() -> Iterator[Callable[[str], Server]]:
    """The server that a page asks for; pages that ask for the same share it."""
    with ExitStack() as stack:
        running: dict[tuple[str, ...], Server] = {}

        def server(page: str) -> Server:
            flags = flags_of(page)
            if flags not in running:
                running[flags] = stack.enter_context(serving("--admin-key", ADMIN, *flags))
            return running[flags]

        yield server


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is_and_why_it_is_not_run(page: str) -> None:
    for block in blocks(page):
        assert block.language in RUN | SHOWN, f"{block}: name the block's language, one of {sorted(RUN | SHOWN)}"
        if block.not_run is not None:
            print(f"{block} is not run: {block.not_run}")
            assert block.language in RUN, f"{block}: {block.language} is never run, so it needs no comment"
            assert len(block.not_run) > 10, f"{block}: give a reason"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page: str) -> None:
    """Also of blocks that are not run."""
    for block in blocks(page):
        if block.language in ("sh", "console"):
            for words in ropeway_commands(block.commands):
                try:
                    parse(words)
                except Exception as error:
                    raise AssertionError(f"{block}: ropeway {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUN and not b.not_run for b in blocks(page))]
)
def test_the_page_runs(
    page: str,
    server_for: Callable[[str], Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the server too: a page can name a directory that both use
    url, names = server_for(page).url, {"__name__": "__main__"}
    environment = shell(tmp_path)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for block in blocks(page):
        if block.not_run is not None or block.language not in RUN:
            continue
        if block.language == "python":
            text = _ADDRESS.sub(url.removeprefix("http://"), block.text)
            code = compile("\n" * block.line + text, str(ROOT / page), "exec", dont_inherit=True)
            exec(code, names)
            continue
        script = _CLIENTS.sub(rf"ropeway \1 --url {url}", _ADDRESS.sub(url.removeprefix("http://"), block.commands))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{block}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
        print(f"{block}\n{done.stdout}")
    for made in names.values():
        if isinstance(made, (openai.OpenAI, anthropic.Anthropic, httpx2.Client)):  # a script ends with its process
            made.close()


def shell(folder: Path) -> dict[str, str]:
    """An environment with this installation's commands, and a curl for which an error of the server is a failure."""
    tools = folder / ".tools"
    tools.mkdir()
    curl = tools / "curl"
    curl.write_text('#!/bin/sh\nPATH="${PATH#*:}" exec curl --silent --show-error --fail-with-body "$@"\n')
    curl.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ROPEWAY_", "OPENAI_", "ANTHROPIC_"))}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "ADMIN": ADMIN}


def ropeway_commands(script: str) -> Iterator[list[str]]:
    """The arguments of each `ropeway` in a script."""
    for line in script.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(part, comments=True)
            while words and "=" in words[0]:  # variables before a command
                words.pop(0)
            if words and words[0].endswith("ropeway"):
                yield [word for word in words[1:] if word != "--help"]


def parse(words: list[str]) -> None:
    """Raises what the command line has to complain about, without running anything."""
    command: Any = get_command(app)
    context = command.make_context("ropeway", list(words))
    while getattr(command, "commands", None):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
