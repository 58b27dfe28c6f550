"""Forms are read the same however they are cut, and what is no form is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.api.errors import HttpError
from ropeway.api.multipart import MAX_PART_HEAD, MAX_PARTS, Multipart, boundary_of

BOUNDARY = b"--edge"
Field = tuple[str, str | None, bytes]

names = st.text(alphabet='ab"\\ []é;=', min_size=1, max_size=8)
# Pieces of delimiters are what a cut can go wrong at.
pieces = st.sampled_from([b"\r\n", b"--", b"edge", b"\r", b"-", b"x", b"\r\n----edg", b"\0"])
contents = st.lists(pieces).map(b"".join).filter(lambda content: b"\r\n--" + BOUNDARY not in content)
fields = st.lists(st.tuples(names, st.none() | names, contents), max_size=4)


def encoded(form: list[Field]) -> bytes:
    parts = []
    for name, filename, content in form:
        head = f'Content-Disposition: form-data; name="{quoted(name)}"'
        head += "" if filename is None else f'; filename="{quoted(filename)}"\r\nContent-Type: text/plain'
        parts.append(b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n")
    return b"".join([*parts, b"--" + BOUNDARY + b"--\r\n"])


def quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def read(pieces: list[bytes]) -> list[Field]:
    form, found = Multipart(BOUNDARY), []
    for piece in pieces:
        found += form.feed(piece)
    form.close()
    parts = list(dict.fromkeys(part for part, _ in found))
    return [(p.name, p.filename, b"".join(data for part, data in found if part is p)) for p in parts]


@given(fields, st.lists(st.integers(0, 400), max_size=12))
def test_a_form_is_read_as_it_was_written_wherever_it_is_cut(form: list[Field], cuts: list[int]) -> None:
    body = b"a preamble\r\n" + encoded(form) + b"an epilogue"
    edges = sorted({0, *(cut for cut in cuts if cut < len(body)), len(body)})
    assert read([body[a:b] for a, b in itertools.pairwise(edges)]) == form
    assert read([body[i : i + 1] for i in range(len(body))]) == form


def test_no_more_is_held_than_a_delimiter() -> None:
    form = Multipart(BOUNDARY)
    form.feed(encoded([("file", "a", b"")])[: -len(b"\r\n--" + BOUNDARY + b"--\r\n")])
    for _ in range(100):
        passed = sum(len(data) for _, data in form.feed(b"\r\n--" * 1000))
        assert passed >= 4000 - len(BOUNDARY) - 4
        assert len(form._held) < len(BOUNDARY) + 8


def test_names_as_browsers_and_clients_write_them() -> None:
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename=%b\r\n\r\n\r\n--x--'
    for written, name in ((b'"a%22b.jsonl"', 'a"b.jsonl'), (b"plain.jsonl", "plain.jsonl"), (b'"a;b"', "a;b")):
        [(part, _)] = Multipart(b"x").feed(head % written)
        assert (part.name, part.filename) == ("file", name)
    [(part, _)] = Multipart(b"x").feed(head % b"\"x\"; filename*=UTF-8''%C3%A4.jsonl")
    assert part.filename == "ä.jsonl"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no boundary at all",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nnever ends',
        b"--x\r\nContent-Type: text/plain\r\n\r\nnameless\r\n--x--",
        b"--x\r\nContent-Disposition: form-data; filename=a\r\n\r\n\r\n--x--",
        b'--x\r\nContent-Disposition: attachment; name="a"\r\n\r\n\r\n--x--',
        b'--xy\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n--xy--',
        b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--x--',
        b"--x\r\n" + b"a: b\r\n" * MAX_PART_HEAD,
        b"--x" + b" " * 2 * MAX_PART_HEAD,
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * (MAX_PARTS + 1) + b"--x--",
    ],
)
def test_what_is_no_form_is_refused(body: bytes) -> None:
    form = Multipart(b"x")

    def whole() -> None:
        form.feed(body)
        form.close()

    with pytest.raises(HttpError) as refused:
        whole()
    assert refused.value.status == 400


def test_the_boundary_of_a_content_type() -> None:
    assert boundary_of("multipart/form-data; boundary=abc") == b"abc"
    assert boundary_of('Multipart/Form-Data; charset=utf-8; Boundary="a b"') == b"a b"
    for wrong in (
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/x; boundary=a",
    ):
        with pytest.raises(HttpError) as refused:
            boundary_of(wrong)
        assert refused.value.status == 415
