"""The documentation as a site: every page has its place, and every link leads somewhere inside of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
EVIDENCE = [page for page in PAGES if page.startswith("evidence/") and page != "evidence/index.md"]
"""What `make evidence` writes, one for each model that somebody measures."""
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Reads what names functions of Markdown's extensions as nothing."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: None)


def placed(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for one in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from placed(one)


def anchors(page: Path) -> set[str]:
    """Those that headings get, as GitHub and MkDocs make them."""
    found = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.replace("`", "").lower()).strip().replace(" ", "-") for one in found}


def test_every_page_has_its_place_once() -> None:
    nav = yaml.load((DOCS.parent / "mkdocs.yml").read_text(), Loader=_Loader)["nav"]
    assert sorted([*placed(nav), *EVIDENCE]) == PAGES


def test_the_evidence_is_reached_from_its_first_page() -> None:
    linked = set(_LINK.findall((DOCS / "evidence" / "index.md").read_text()))
    assert {page.removeprefix("evidence/") for page in EVIDENCE} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere_inside_of_the_site(page: str) -> None:
    for link in _LINK.findall(_FENCE.sub("", (DOCS / page).read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (DOCS / page).parent / path if path else DOCS / page
        assert target.exists(), link
        assert DOCS in target.resolve().parents, f"{link} leads out of the site"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
