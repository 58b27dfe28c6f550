"""Usage as text: for spreadsheets and for terminals."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final

from ropeway.accounts.account import NANO
from ropeway.accounts.usage import COLUMNS, UsageRow

COUNTS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens", "cost")


def as_csv(rows: Sequence[UsageRow], by: Sequence[str]) -> str:
    """With a head, and an empty field for what is unknown."""
    names = columns(by)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([cell(row, name) for name in names] for row in rows)
    return out.getvalue()


def as_text(rows: Sequence[UsageRow], by: Sequence[str]) -> str:
    """In columns, with numbers to the right; without a newline at the end."""
    names = columns(by)
    lines = [names, *([cell(row, name) or "-" for name in names] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if name in COUNTS else text.ljust(width)
            for text, width, name in zip(line, widths, names, strict=True)
        ).rstrip()
        for line in lines
    )


def columns(by: Sequence[str]) -> list[str]:
    """What is shown of usage that is told by `by`."""
    chosen = [name for name in COLUMNS if name in by]
    if "key" in chosen:
        chosen.insert(chosen.index("key") + 1, "name")
    return [*chosen, *COUNTS]


def cell(row: UsageRow, name: str) -> str:
    value = getattr(row, name)
    if name == "cost" and value is not None:
        return f"{round(value * NANO) / NANO:.9f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)
