"""`python -m ropeway.cli.reference docs/cli.md`: write the table of settings into the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

from ropeway.cli.options import default_text, flags_of, limits, value_name
from ropeway.config import EngineConfig, ServerConfig, Setting, settings

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def settings_table() -> str:
    """All settings of `serve` in Markdown, one table for each group."""
    known = settings(EngineConfig, ServerConfig)
    parts: list[str] = []
    for group in dict.fromkeys(s.group for s in known):
        parts += [f"### {group}", "", "| option | default | meaning |", "|---|---|---|"]
        parts += [_row(s) for s in known if s.group == group]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(setting: Setting) -> str:
    value = "" if setting.kind is bool else " " + value_name(setting).replace("|", "\\|")
    flag = "`MODEL`" if setting.name == "model" else f"`{flags_of(setting)}{value}`"
    meaning = setting.help + (f" ({limits(setting)})" if limits(setting) else "")
    return f"| {flag} | {default_text(setting)} | {meaning} |"


def insert(page: str) -> str:
    """`page` with the table between its markers replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{settings_table()}{END}{tail}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
