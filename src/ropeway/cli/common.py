"""What commands that ask a running server have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ropeway.cli.client import Client

URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Address of the server.")]
Key = Annotated[str | None, typer.Option(help="Key of the server (or ROPEWAY_API_KEY, OPENAI_API_KEY).")]
AnyKey = Annotated[
    str | None, typer.Option(help="A client's key, or the admin key to see all (or ROPEWAY_API_KEY, OPENAI_API_KEY).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def key_from(environ: Mapping[str, str]) -> str | None:
    """The key that clients on this machine use: the first of the server's own, or the one for OpenAI."""
    keys = environ.get("ROPEWAY_API_KEY") or environ.get("OPENAI_API_KEY") or ""
    return keys.split(",")[0].strip() or None


def print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


@contextmanager
def connected(url: str, api_key: str | None, model: str | None = None) -> Iterator[Client]:
    """A client of the server at `url`, whose connections end with the block. Raises RopewayError."""
    from ropeway.cli.client import Client

    with closing(Client(url, api_key=api_key or key_from(os.environ), model=model)) as client:
        yield client


def ask(method: str, path: str, url: str, api_key: str | None, body: Any = None) -> Any:
    """The JSON at `path` of the server at `url`. Raises RopewayError."""
    with connected(url, api_key) as client:
        return client.call(method, path, body)
