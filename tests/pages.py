"""The pages of the documentation, and their blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])

_FENCE = re.compile(r"^( *)```(.*)$")
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
_SERVER = re.compile(r"<!-- server: (.+?) -->")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> str:
        """What a shell is to run."""
        if self.language == "sh":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))


def blocks(page: str) -> list[Block]:
    found, reason, inside = [], None, None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is None and fence is None and line.strip():
            mark = _NOT_RUN.fullmatch(line.strip())
            reason = mark[1] if mark else None
        elif inside is None and fence is not None:
            inside = (number, fence[1], fence[2].strip(), [])
        elif inside is not None and fence is not None:
            start, indent, language, lines = inside
            text = "\n".join(one.removeprefix(indent) for one in lines)
            found.append(Block(page, start, language, text, reason))
            inside = reason = None
        elif inside is not None:
            inside[3].append(line)
    assert inside is None, f"{page}: a block that never ends"
    return found


def flags_of(page: str) -> tuple[str, ...]:
    """The options of the server that a page asks for."""
    asked = _SERVER.search((ROOT / page).read_text())
    words = shlex.split(asked[1]) if asked else []
    return tuple(str(ROOT / word) if (ROOT / word).is_file() else word for word in words)
