"""What `serve` prints when it is ready."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ropeway._version import __version__
from ropeway.config import ServerConfig
from ropeway.contract import ExecutorInfo
from ropeway.service.loader import ModelText

if TYPE_CHECKING:
    from ropeway.api.deployments import DeploymentList

QUESTION = "What is continuous batching?"
ANSWERS = ["Requests join and leave the batch at every step.", "A cable car never stops."]


def curl_line(url: str, model: str, info: ExecutorInfo, *, chat: bool, key: bool) -> str:
    """A command that streams an answer, or asks an encoder for what it makes, to be pasted into a shell."""
    fields: dict[str, object] = {"model": model, "stream": True}
    if info.pooling is not None and not info.generates:
        judges = info.pooling.judges
        path = "/v1/rerank" if judges else "/v1/embeddings"
        fields = {"model": model, **({"query": QUESTION, "documents": ANSWERS} if judges else {"input": ANSWERS})}
    elif chat:
        path, fields["messages"] = "/v1/chat/completions", [{"role": "user", "content": QUESTION}]
    else:
        path, fields["prompt"], fields["max_tokens"] = "/v1/completions", "Once upon a time", 64
    return curl(url + path, fields, key=key)


def curl(address: str, fields: Mapping[str, object], *, key: bool) -> str:
    """A command that posts `fields`. The key itself is never printed: a banner ends up in logs."""
    lines = [f"curl -N {address}", "-H 'content-type: application/json'"]
    if key:
        lines.append('-H "authorization: Bearer $ROPEWAY_API_KEY"')
    return " \\\n    ".join([*lines, f"-d {shlex.quote(json.dumps(fields))}"])


def banner(
    url: str, model: str, info: ExecutorInfo, server: ServerConfig, text: ModelText, phases: Mapping[str, float]
) -> str:
    """Address, a first request, what runs where and why, and what start-up took.

    `phases` are seconds since the start at which the text side, the HTTP side and everything was ready.
    """
    what = f"{model} ({info.model})" if info.model != model else model
    chat = f"{program()} chat" + ("" if url == "http://127.0.0.1:8000" else f" --url {url}")
    lines = [
        f"Ropeway {__version__} serves {what} at {url}",
        "",
        *(f"  {note}" for note in (*info.notes, *text.dialect.notes)),
        f"  Seats: {info.max_slots} requests run at once; the context is {info.max_model_len:,} tokens.",
        f"  Start-up: tokenizer and template after {phases['text']:.1f} s, HTTP after {phases['http']:.1f} s, "
        f"engine ready after {phases['ready']:.1f} s.",
        "",
        "  " + curl_line(url, model, info, chat=text.template is not None, key=server.api_key is not None),
        "",
        f"  {f'or: {chat}    ' if info.generates else ''}See it work: {url}/ui/    API: {url}/docs    Ctrl-C stops.",
    ]
    return "\n".join(lines)


def program() -> str:
    """What to type for this program: its path where no shell would find it, as after `make serve`."""
    here = Path(sys.argv[0])
    return str(here) if here.name == "ropeway" and shutil.which("ropeway") is None else "ropeway"


def table_banner(
    url: str, deployments: DeploymentList, routes: Sequence[str], server: ServerConfig, phases: Mapping[str, float]
) -> str:
    """Address, models and where they lead, and a first request. `routes` are the public names."""
    lines = [f"Ropeway {__version__} serves {len(routes)} models at {url}", ""]
    for name in routes:
        led = [one for one in deployments.data if name in one.routes]
        lines.append(f"  {name}: " + ", ".join(f"{one.name} ({one.kind}, {one.model}, {one.phase})" for one in led))
    if deployments.memory_gib is not None:
        lines.append(f"  Memory: {deployments.memory_used_gib:g} of {deployments.memory_gib:g} GiB.")
    question = {"model": routes[0], "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    return "\n".join(
        [
            *lines,
            f"  Start-up: HTTP after {phases['http']:.1f} s, models ready after {phases['ready']:.1f} s.",
            "",
            "  " + curl(f"{url}/v1/chat/completions", question, key=server.api_key is not None),
            "",
            f"  See it work: {url}/ui/    API: {url}/docs    Deployments: {url}/admin/deployments    Ctrl-C stops.",
        ]
    )
