"""`python -m ropeway.api.fields docs/PAGE.md...`: write the tables of request fields into the documentation.

The schema says what is honoured, `parse` what is refused and what is ignored on purpose. There is no other list.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ropeway.api import anthropic_input, responses_input
from ropeway.api.anthropic_schema import MessageRequest
from ropeway.api.parse import CHAT_REFUSED, COMPLETION_REFUSED, IGNORED, Refused
from ropeway.api.responses_schema import ResponseRequest
from ropeway.api.schema import ChatCompletionRequest, CompletionRequest
from ropeway.api.translate import EXTRAS

BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxItems": "at most"}
_OPEN = 2**31 - 1
"""From here on a bound is that of a machine's number, and not worth a word."""


def table() -> str:
    """All known fields of the two generating endpoints in Markdown."""
    chat, text = _properties(ChatCompletionRequest), _properties(CompletionRequest)
    lines = ["| field | chat | text | meaning |", "|---|---|---|---|"]
    for name in sorted({**chat, **text}):
        meanings = dict.fromkeys(_about(kind[name]) for kind in (chat, text) if name in kind)
        about = " Text: ".join(meanings)
        lines.append(_row(name, *("honoured" if name in kind else "" for kind in (chat, text)), about))
    lines += ["", "Refused with a 400 that names the field, unless they ask for nothing:", ""]
    lines += ["| field | chat | text | asks for nothing | instead |", "|---|---|---|---|---|"]
    for name, (neutral, why) in sorted({**CHAT_REFUSED, **COMPLETION_REFUSED}.items()):
        nothing = ", ".join(f"`{value.decode()}`" for value in neutral)
        chats, texts = ("refused" if name in table else "" for table in (CHAT_REFUSED, COMPLETION_REFUSED))
        lines.append(_row(name, chats, texts, nothing, why))
    lines += ["", "Known and without effect, so named in `x-ropeway-ignored-params` like any unknown field:", ""]
    lines += ["| field | why |", "|---|---|"]
    lines += [_row(name, why) for name, why in sorted(IGNORED.items())]
    return "\n".join(lines) + "\n"


def translated(kind: type[msgspec.Struct], refused: Refused, ignored: Mapping[str, str]) -> str:
    """The fields of a dialect that is translated into a chat completion."""
    own = _properties(kind)
    lines = ["| field | meaning |", "|---|---|"]
    lines += [_row(name, _about(described)) for name, described in sorted(own.items())]
    extras = ", ".join(f"`{name}`" for name in sorted(set(EXTRAS) - {*own, *refused}))
    lines += ["", f"As in a [chat completion](openai-api.md#fields): {extras}."]
    lines += ["", "Refused with a 400 that names the field, unless they ask for nothing:", ""]
    lines += ["| field | asks for nothing | instead |", "|---|---|---|"]
    for name, (neutral, why) in sorted(refused.items()):
        lines.append(_row(name, ", ".join(f"`{value.decode()}`" for value in neutral), why))
    lines += ["", "Known and without effect, so named in `x-ropeway-ignored-params` like any unknown field:", ""]
    lines += ["| field | why |", "|---|---|", *(_row(name, why) for name, why in sorted(ignored.items()))]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "openai-api.md": table,
    "responses.md": lambda: translated(ResponseRequest, responses_input.REFUSED, responses_input.IGNORED),
    "anthropic.md": lambda: translated(MessageRequest, anthropic_input.REFUSED, anthropic_input.IGNORED),
}
"""What stands on each page."""


def insert(page: str, name: str = "openai-api.md") -> str:
    """`page` with the table between its markers replaced by that of the page `name`."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{TABLES[name]()}{END}{tail}"


def _properties(kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    (_,), found = msgspec.json.schema_components([kind], ref_template="{name}")
    properties: dict[str, dict[str, Any]] = found[kind.__name__]["properties"]
    return properties


def _row(name: str, *cells: str) -> str:
    return " | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def _about(described: dict[str, Any]) -> str:
    branches = [described, *described.get("anyOf", ())]
    about = next((str(branch["description"]) for branch in branches if "description" in branch), "")
    bounds = [
        f"{sign} {branch[key]:,}"
        for branch in branches
        for key, sign in _SIGNS.items()
        if abs(branch.get(key, _OPEN)) < _OPEN
    ]
    bounds += [", ".join(f"`{one}`" for one in branch["enum"] if one) for branch in branches if "enum" in branch]
    bounds = [bound for bound in bounds if bound not in about]
    return f"{about} ({', '.join(bounds)})" if bounds else about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tables of request fields into the docs.")
    parser.add_argument("page", type=Path, nargs="+")
    for path in parser.parse_args().page:
        path.write_text(insert(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")
