"""docs/troubleshooting.md says what is said: its messages are those of `mistakes/`, its codes those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from aloud import MISTAKES, Book

from ropeway.api.errors import StreamCancelled, classify
from ropeway.cli.main import exit_code
from ropeway.errors import BY_CODE, RopewayError

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
_BLOCK = re.compile(r"(<!-- mistakes: (?P<titles>.+?) -->\n```text\n)(?P<said>.*?)(```)", re.DOTALL)
_ROW = re.compile(r"^\| `(RW-\w+)` \|.*$", re.MULTILINE)


def said() -> dict[str, str]:
    """What is said of each mistake, over all books."""
    found: dict[str, str] = {}
    for path in sorted(MISTAKES.glob("*.txt")):
        for title, entry in Book(path.stem).entries.items():
            assert title not in found, f"two books have {title!r}"
            found[title] = "\n".join(
                line for line in entry.splitlines()[1:] if not line.startswith(("exit code", "param:"))
            )
    return found


def filled(page: str) -> str:
    """`page` with the blocks that its comments ask for."""
    known = said()

    def block(match: re.Match[str]) -> str:
        lines = [known[title] for title in match["titles"].split("; ")]
        return f"{match[1]}" + "\n".join(lines) + f"\n{match[4]}"

    return _BLOCK.sub(block, page)


def row(code: str, error: type[RopewayError]) -> tuple[str, ...]:
    """What the table has to say of a class, but for its meaning in words."""
    status, body = classify(error("x"))
    kind = f"`{body.type}`" + (f", `{body.code}`" if body.code else "")
    return f"`{code}`", str(status), kind, str(exit_code(error("x")))


def test_the_page_shows_what_is_said(update: bool) -> None:
    page = PAGE.read_text()
    if update:
        PAGE.write_text(filled(page))
    else:
        assert filled(page) == page, "pytest tests/errors --update"
    assert len(_BLOCK.findall(page)) == page.count("<!-- mistakes:")


def test_the_page_has_all_codes() -> None:
    rows = [[cell.strip() for cell in found[0].strip("|").split("|")] for found in _ROW.finditer(PAGE.read_text())]
    found = {(name, status, kind, code) for name, _, status, kind, code in rows}
    told = {**BY_CODE, StreamCancelled.code: StreamCancelled}
    assert found == {row(code, error) for code, error in told.items() if code != "RW"}
    assert all(len(cells[1]) > 10 for cells in rows)
