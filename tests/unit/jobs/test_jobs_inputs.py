"""Inputs of batches: each wrong line is named, and a right one is read the same wherever reading begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import ENDPOINT, jsonl, quick_folder, request
from ropeway.jobs.inputs import MOST_ERRORS, Checked, check, portions

LONGEST = 4096


def checked(data: bytes, **more: Any) -> Checked:
    with quick_folder() as folder:
        (folder / "in.jsonl").write_bytes(data)
        return check(folder / "in.jsonl", **{"endpoint": ENDPOINT, "most": 50_000, "longest": LONGEST, **more})


def line(custom_id: str = "a", **more: Any) -> bytes:
    return json.dumps(request(custom_id, **more)).encode()


def test_a_good_input() -> None:
    assert checked(jsonl(3)) == Checked(3, "m", [])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + jsonl(2), id="byte order mark"),
        pytest.param(jsonl(2).replace(b"\n", b"\r\n"), id="line ends of Windows"),
        pytest.param(jsonl(2).rstrip(b"\n"), id="no last line end"),
        pytest.param(b"\n\n" + jsonl(2).replace(b"\n", b"\n  \n") + b"\n", id="empty lines"),
        pytest.param(line("é\U0001f6a1") + b"\n" + line("a\x00b"), id="any text is a custom_id"),
        pytest.param(line("a" * 1500) + b"\n" + line("b"), id="a long one"),
    ],
)
def test_what_is_forgiven(data: bytes) -> None:
    assert checked(data) == Checked(2, "m", [])


BODY = {"model": "m", "messages": []}
WRONG = {
    "empty": (b"", [("empty_file", None)]),
    "only line ends": (b"\n\r\n \n", [("empty_file", None)]),
    "only a byte order mark": (b"\xef\xbb\xbf", [("empty_file", None)]),
    "no JSON": (line() + b"\nnonsense\n" + line("b"), [("invalid_json_line", 2)]),
    "cut off": (line() + b"\n" + line("b")[:-1], [("invalid_json_line", 2)]),
    "two in one line": (line("a") + line("b"), [("invalid_json_line", 1)]),
    "an array": (b"[]\n", [("invalid_json_line", 1)]),
    "another encoding": (json.dumps(request("a")).encode("utf-16"), [("invalid_json_line", 1)]),
    "no UTF-8": (line("\udcff").replace(b"\\udcff", b"\xff"), [("invalid_json_line", 1)]),
    "half a character": (line("\ud800"), [("invalid_json_line", 1)]),
    "a body that is no UTF-8": (line(model="\udcff").replace(b"\\udcff", b"\xff"), [("invalid_json_line", 1)]),
    "twice the same": (line("a") + b"\n\n" + line("b") + b"\n" + line("a"), [("duplicate_custom_id", 4)]),
    "no custom_id": (line(custom_id=None), [("missing_required_parameter", 1)]),
    "an empty custom_id": (line(custom_id=""), [("missing_required_parameter", 1)]),
    "a number": (line(custom_id=7), [("missing_required_parameter", 1)]),
    "GET": (line(method="GET"), [("invalid_method", 1)]),
    "another url": (line(url="/v1/embeddings"), [("url_mismatch", 1)]),
    "a url with a query": (line(url=ENDPOINT + "?a=b"), [("url_mismatch", 1)]),
    "no body": (json.dumps({k: v for k, v in request("a").items() if k != "body"}).encode(),
                [("missing_required_parameter", 1)]),
    "a body that is a text": (line(body="x"), [("missing_required_parameter", 1)]),
    "no model": (line(body={"messages": []}), [("missing_required_parameter", 1)]),
    "an unknown model": (line(model="other"), [("model_not_found", 1)]),
    "two models": (line("a") + b"\n" + line("b", model="other"), [("model_mismatch", 2)]),
    "streaming": (line(body={**BODY, "stream": True}), [("unsupported_value", 1)]),
    "too long": (line("a") + b"\n" + line("b" * LONGEST) + b"\n" + line("c"), [("line_too_long", 2)]),
    "several": (b"x\n" + line("a") + b"\ny\n" + line("b", method="PUT"),
                [("invalid_json_line", 1), ("invalid_json_line", 3), ("invalid_method", 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line(name: str) -> None:
    data, expected = WRONG[name]
    found = checked(data, serves=lambda model: model == "m")
    assert [(error.code, error.line) for error in found.errors] == expected
    assert all(len(error.message) < 300 and error.message.endswith(".") for error in found.errors)


@pytest.mark.parametrize("field", [b"custom_id", b"body"])
def test_what_nests_too_deeply_to_be_read_is_wrong(field: bytes) -> None:
    depth = 50_000  # Python 3.13 reads some 10,000
    (error,) = checked(b'{"%s":' % field + b"[" * depth + b"]" * depth + b"}", longest=2**20).errors
    assert (error.code, error.line) == ("invalid_json_line", 1)


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda at, cut, new: line()[:at] + new + line()[at + cut :],
        st.integers(0, len(line())),
        st.integers(0, 5),
        st.binary(max_size=5),
    )
)
def test_whatever_is_sent_is_understood_or_refused(data: bytes) -> None:
    found = checked(data)
    assert found.errors or (found.total > 0 and found.model)
    with quick_folder() as folder:
        path = folder / "in.jsonl"
        path.write_bytes(data)
        if not found.errors:
            [(lines, ends)] = portions(path, endpoint=ENDPOINT, longest=LONGEST, begin=0, line=0)
            assert len(lines) == found.total
            assert ends <= len(data)
            assert all(isinstance(json.loads(one.body), dict) for one in lines)


def test_the_number_of_requests_is_bounded() -> None:
    assert checked(jsonl(50), most=50) == Checked(50, "m", [])
    found = checked(jsonl(51), most=50)
    assert [(error.code, error.line) for error in found.errors] == [("too_many_tasks", None)]


def test_the_number_of_errors_is_bounded() -> None:
    found = checked(b"x\n" * 10_000)
    assert len(found.errors) == MOST_ERRORS


def test_nobody_reads_on_for_nobody() -> None:
    assert checked(jsonl(5000), wanted=lambda: False).total == 256


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=30),
    breaks=st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n\r\n"]), min_size=30, max_size=30),
    mark=st.booleans(),
    last=st.booleans(),
    most=st.integers(1, 7),
    size=st.integers(1, 2000),
)
def test_reading_on_gives_what_reading_at_once_gives(
    sizes: list[int], breaks: list[bytes], mark: bool, last: bool, most: int, size: int
) -> None:
    """Wherever a portion ends, the rest is read from there with the same lines and numbers."""
    rows = [line(f"{number}-" + "x" * length) for number, length in enumerate(sizes)]
    data = b"".join(row + end for row, end in zip(rows, breaks, strict=False))
    data = (b"\xef\xbb\xbf" if mark else b"") + (data if last else data.rstrip(b"\r\n "))
    numbers = [number for number, text in enumerate(data.split(b"\n"), 1) if text.strip(b"\xef\xbb\xbf\r ")]
    with quick_folder() as folder:
        path = folder / "in.jsonl"
        path.write_bytes(data)
        found, at, number = [], 0, 0
        while True:
            # Only the first portion is used each time, as after a crash.
            first = next(
                portions(path, endpoint=ENDPOINT, longest=LONGEST, begin=at, line=number, most=most, size=size), None
            )
            if first is None:
                break
            lines, at = first
            assert 1 <= len(lines) <= most
            found += lines
            number = lines[-1].number
    assert [one.number for one in found] == numbers
    assert [one.custom_id for one in found] == [json.loads(row)["custom_id"] for row in rows]
    assert [json.loads(one.body) for one in found] == [json.loads(row)["body"] for row in rows]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has used at most is told by Linux")
def test_a_large_input_needs_little_memory(tmp_path: Path) -> None:
    """By default 40 MB; ROPEWAY_INPUT_MB=200 is the largest that the server takes."""
    megabytes = int(os.environ.get("ROPEWAY_INPUT_MB", "40"))
    path = tmp_path / "in.jsonl"
    filling = "x" * (megabytes * 20)
    with path.open("w") as file:
        for number in range(50_000):
            file.write(json.dumps(request(f"{number}-{filling}")) + "\n")
    assert path.stat().st_size > megabytes * 1_000_000
    code = (
        "import re, sys; from pathlib import Path; from ropeway.jobs.inputs import check, portions\n"
        "path, endpoint = Path(sys.argv[1]), sys.argv[2]\n"
        "found = check(path, endpoint=endpoint, most=50_000, longest=16 << 20)\n"
        "assert found.total == 50_000 and not found.errors, found\n"
        "read = sum(len(p) for p, _ in portions(path, endpoint=endpoint, longest=16 << 20, begin=0, line=0))\n"
        "assert read == 50_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), ENDPOINT], capture_output=True, text=True, check=True)
    used = int(done.stdout) / 1000
    assert used < 80, f"{used:.0f} MB for a file of {megabytes} MB"
