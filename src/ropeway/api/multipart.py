"""multipart/form-data as it arrives, without ever holding more of it than a header and the last chunk.

Sources: RFC 7578 and RFC 2046 section 5.1; names and file names escape quotes as HTML's forms do, or with a backslash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from ropeway.api.errors import HttpError

MAX_PART_HEAD: Final = 8 * 1024
MAX_PARTS: Final = 32

_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition:[ \t]*form-data[ \t]*(;.*)$", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(r';[ \t]*([A-Za-z]+\*?)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^;"\s]*))')
_PADDING = b" \t"


@dataclass(frozen=True, eq=False)
class Part:
    """One field of the form. `filename` is None unless it is a file."""

    name: str
    filename: str | None


def boundary_of(content_type: str) -> bytes:
    """Raises HttpError (415) unless this is a form with parts."""
    kind, _, rest = content_type.partition(";")
    found = _BOUNDARY.search(rest)
    if kind.strip().lower() != "multipart/form-data" or found is None:
        raise HttpError(415, "Send the file as multipart/form-data, with a boundary in Content-Type.")
    return (found[1] or found[2]).encode("latin-1")


class Multipart:
    """Feed it what arrives. Each piece that comes back belongs to a part; a part has at least one piece, and all of its
    pieces come before those of the next. Raises HttpError (400) for what is no form."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._held = b"\r\n"  # so that the first delimiter looks like all others
        self._part: Part | None = None
        self._parts = 0
        self._step = self._preamble

    def feed(self, data: bytes) -> list[tuple[Part, bytes]]:
        self._held += data
        found: list[tuple[Part, bytes]] = []
        while self._step(found):
            pass
        return found

    def close(self) -> None:
        """Raises HttpError unless the form is complete."""
        if self._step != self._epilogue:
            raise HttpError(400, "The form ends before its last boundary. Send it again.")

    # Each step takes what it can from what is held, and says whether the next step has something to look at.

    def _preamble(self, found: list[tuple[Part, bytes]]) -> bool:
        at = self._held.find(self._delimiter)
        if at < 0:
            self._held = self._held[-len(self._delimiter) + 1 :]
            return False
        self._held = self._held[at + len(self._delimiter) :]
        self._step = self._after_delimiter
        return True

    def _after_delimiter(self, found: list[tuple[Part, bytes]]) -> bool:
        held = self._held.lstrip(_PADDING)
        if len(held) < 2:
            if len(self._held) > MAX_PART_HEAD:
                raise _malformed("a boundary's line does not end")
            return False
        if held.startswith(b"--"):
            self._held = b""
            self._step = self._epilogue
            return False
        if not held.startswith(b"\r\n"):
            raise _malformed("a boundary is followed by something else than the end of its line")
        self._held = held  # with the end of its line
        self._step = self._head
        return True

    def _head(self, found: list[tuple[Part, bytes]]) -> bool:
        at = self._held.find(b"\r\n\r\n")
        if at > MAX_PART_HEAD or (at < 0 and len(self._held) > MAX_PART_HEAD):
            raise _malformed(f"a part's headers are longer than {MAX_PART_HEAD} bytes")
        if at < 0:
            return False
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"it has more than {MAX_PARTS} fields")
        self._part = _part(self._held[2 : at + 2])
        self._held = self._held[at + 4 :]
        found.append((self._part, b""))
        self._step = self._body
        return True

    def _body(self, found: list[tuple[Part, bytes]]) -> bool:
        assert self._part is not None
        at = self._held.find(self._delimiter)
        if at >= 0:
            if at:
                found.append((self._part, self._held[:at]))
            self._held = self._held[at + len(self._delimiter) :]
            self._step = self._after_delimiter
            return True
        keep = len(self._delimiter) - 1
        if len(self._held) > keep:
            found.append((self._part, self._held[:-keep]))
            self._held = self._held[-keep:]
        return False

    def _epilogue(self, found: list[tuple[Part, bytes]]) -> bool:
        self._held = b""
        return False


def _part(head: bytes) -> Part:
    found = _DISPOSITION.search(head.replace(b"\r\n", b"\n"))
    if found is None:
        raise _malformed("a part has no 'Content-Disposition: form-data'")
    try:
        text = found[1].decode()
    except UnicodeDecodeError:
        raise _malformed("a part's name is not UTF-8") from None
    values = {}
    for name, quoted, plain in _PARAMETER.findall(text):
        values[name.lower()] = _unescaped(quoted) if quoted else plain
    if "name" not in values:
        raise _malformed("a part has no name")
    filename = values.get("filename")
    if "filename*" in values:
        filename = unquote(values["filename*"].rpartition("'")[2])
    return Part(values["name"], filename)


def _unescaped(quoted: str) -> str:
    quoted = re.sub(r"\\(.)", r"\1", quoted)
    return quoted.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def _malformed(what: str) -> HttpError:
    return HttpError(400, f"The body is not a valid form: {what}.")
