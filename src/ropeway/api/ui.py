"""The page at /ui/: files of the package, which need no build, no key and no other server.

Nothing of the server's state is in them. The page asks for that as any other client does, with the key of whoever
looks at it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

ROOT: Final = "/ui/"
_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""What the page may do: run and show what this server sends as files, and talk to this server. Text never becomes
code or markup, whatever a model says."""

_HEADERS: Final = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    kind: str
    body: bytes
    etag: str


def _read() -> dict[str, Asset]:
    """All files of the page by their path, and its first one also by that of the directory."""
    found: dict[str, Asset] = {}
    for file in sorted(resources.files("ropeway.observe").joinpath("ui").iterdir(), key=lambda file: file.name):
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            body = file.read_bytes()
            found[ROOT + file.name] = Asset(kind, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    found[ROOT] = found[ROOT + "index.html"]
    return found


ASSETS: Final = _read()
HOMES: Final = ("/", ROOT.rstrip("/"))
"""What leads to it: the address that a server prints, opened as it is."""

PATHS: Final = frozenset({*HOMES, *ASSETS})
"""What anybody may ask for without a key."""


async def home(request: Request) -> Response:
    """To the page, also where a proxy has put the server below another path."""
    return RedirectResponse("ui/", headers={"cache-control": "no-cache"})


async def asset(request: Request) -> Response:
    """A file of the page; 304 if the browser has it already."""
    found = ASSETS[request.url.path]
    headers = {**_HEADERS, "etag": found.etag}
    if found.etag in _tags(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.kind)


def _tags(header: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}
