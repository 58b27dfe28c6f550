"""The page's files: whole, free of whatever its policy forbids, open to all, and asked for again only when they change;
and the simulation that one of its pages asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
import pytest

from apiserver import Server, running
from ropeway.api.ui import ASSETS, HOMES, PATHS, POLICY, ROOT
from ropeway.contract.compare import MAX_TOKENS, Comparison
from ropeway.service.echo import EchoService

_IMPORT = re.compile(r"""from "\./([\w.]+)";""")
_LINK = re.compile(r"""(?:href|src)="([\w.]+)\"""")
_ELSEWHERE = re.compile(r"https?://(?!www\.w3\.org/)|wss?://")
_ELSEWHERE_CSS = re.compile(r"https?:|@import|url\(")
_DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style"
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with running(EchoService(), api_key="client", admin_key="owner") as up:
        yield up


@pytest.mark.parametrize("path", sorted(ASSETS))
def test_a_file_comes_without_a_key_and_with_the_policy(guarded: Server, path: str) -> None:
    found = guarded.http.get(path)
    assert (found.status_code, found.content) == (200, ASSETS[path].body)
    assert found.headers["content-type"] == ASSETS[path].kind
    assert found.headers["content-security-policy"] == POLICY
    assert found.headers["x-content-type-options"] == "nosniff"
    tag = found.headers["etag"]
    for header in (tag, f'"other", W/{tag}'):
        again = guarded.http.get(path, headers={"if-none-match": header})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert guarded.http.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    head = guarded.http.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


@pytest.mark.parametrize("path", HOMES)
def test_the_way_to_the_page(guarded: Server, path: str) -> None:
    found = guarded.http.get(path)
    assert (found.status_code, found.headers["location"]) == (307, "ui/")
    assert guarded.http.get(ROOT).text.startswith("<!doctype html>")


@pytest.mark.parametrize(
    "path", ["/ui/none.js", "/ui/../pyproject.toml", "/ui/%2e%2e/metrics.py", "/ui/index.htm", "/ui//app.js"]
)
def test_nothing_else_is_there(guarded: Server, path: str) -> None:
    raw = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer client\r\nconnection: close\r\n\r\n"
    assert guarded.exchange(raw.encode()).startswith(b"HTTP/1.1 404")
    without = raw.replace("authorization: Bearer client\r\n", "")
    assert guarded.exchange(without.encode()).startswith(b"HTTP/1.1 401")


def test_files_name_each_other_and_nothing_elsewhere() -> None:
    names = {path.removeprefix(ROOT) for path in ASSETS} - {""}
    assert names <= {path.removeprefix(ROOT) for path in PATHS}
    used = {"index.html"}
    for path, asset in ASSETS.items():
        text = asset.body.decode()
        named = set(_IMPORT.findall(text) if path.endswith(".js") else _LINK.findall(text))
        assert named <= names, path
        used |= named
        assert not (_ELSEWHERE_CSS if path.endswith(".css") else _ELSEWHERE).search(text), path
        assert not _DANGEROUS.search(text), path
    assert used == names, "every file is used"
    page = ASSETS[ROOT].body.decode()
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son\w+=", page)


def test_a_comparison(guarded: Server) -> None:
    asked = {"requests": 12, "seats": 3, "answer_tokens": 20, "seed": 4, "colour": "red"}
    assert guarded.http.post("/ui/compare", json=asked).status_code == 401
    found = guarded.http.post("/ui/compare", json=asked, headers={"authorization": "Bearer client"})
    assert found.status_code == 200, found.text
    assert found.headers["x-ropeway-ignored-params"] == "colour"
    told = msgspec.json.decode(found.content, type=Comparison)
    assert len(told.static.rides) == len(told.continuous.rides) == 12
    assert told.basis == "measured"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"requests": 1}, "requests"),
        ({"seats": 65}, "seats"),
        ({"spread": -0.1}, "spread"),
        ({"rate": 0}, "rate"),
        ({"profile": "/etc/passwd"}, "profile"),
        ({"requests": 256, "answer_tokens": MAX_TOKENS // 256 + 1}, "answer_tokens"),
    ],
)
def test_what_a_comparison_may_not_be(guarded: Server, asked: dict[str, object], param: str) -> None:
    found = guarded.http.post("/ui/compare", json=asked, headers={"authorization": "Bearer client"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
