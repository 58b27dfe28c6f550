"""The OpenAPI description, and a page made of it that needs neither a script nor another server."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from ropeway.accounts import Account
from ropeway.api import anthropic_schema as anthropic
from ropeway.api import batches, canary_schema, deferred, files, keys, replies, schema
from ropeway.api import embedding_schema as embedding
from ropeway.api import responses_schema as responses
from ropeway.api.deployments import DeploymentList, DeploymentState
from ropeway.api.errors import ErrorEnvelope
from ropeway.api.registry import RequestList, RequestState
from ropeway.api.translate import EXTRAS
from ropeway.api.usage import UsageList

_COMPONENTS = (
    schema.ChatCompletionRequest, replies.ChatCompletion, schema.CompletionRequest, replies.Completion,
    schema.TokenizeRequest, schema.TokenizeResponse, schema.DetokenizeRequest, schema.DetokenizeResponse,
    schema.ModelList, schema.ModelCard, schema.Readiness, schema.Version, schema.Load, schema.SchedulerState,
    schema.SchedulerChange, schema.PinRequest, schema.PinList, schema.PinState, schema.QueueState,
    responses.ResponseRequest, responses.ResponseBody, responses.InputItems, responses.DeletedResponse,
    responses.TokenCount, anthropic.MessageRequest, anthropic.MessageBody, anthropic.CountRequest,
    anthropic.InputTokens, anthropic.MessageErrorEnvelope,
    embedding.EmbeddingRequest, embedding.EmbeddingList, embedding.ScoreRequest, embedding.ScoreList,
    embedding.RerankRequest, embedding.RerankList,
    files.FileBody, files.FileList, files.DeletedFile, batches.BatchRequest, batches.BatchBody, batches.BatchList,
    deferred.Job, deferred.JobList, deferred.DeletedJob,
    schema.WaitState, RequestList, RequestState, UsageList, DeploymentList, DeploymentState, ErrorEnvelope,
    keys.KeyRequest, keys.KeyMade, keys.KeyList, Account,
    canary_schema.CanaryStart, canary_schema.CanaryChange, canary_schema.CanaryState, canary_schema.CanaryList,
)  # fmt: skip
_REF = "#/components/schemas/"
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--dim:#888}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
code,pre{font:14px/1.45 ui-monospace,monospace}
pre{overflow-x:auto;padding:.75rem;border:1px solid var(--line);border-radius:6px}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.5rem .75rem}summary{cursor:pointer}
summary b{display:inline-block;min-width:4rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-top:1px solid var(--line)}
.dim{color:var(--dim)}h2{margin-top:2.5rem}
"""


def components() -> dict[str, Any]:
    """All types of the wire as JSON schemas, by name."""
    _, found = msgspec.json.schema_components(_COMPONENTS, ref_template=_REF + "{name}")
    extras = found["ChatCompletionRequest"]["properties"]
    for kind in (responses.ResponseRequest, anthropic.MessageRequest, anthropic.CountRequest):
        described = found[kind.__name__]["properties"]
        described |= {name: extras[name] for name in EXTRAS if name in extras and name not in described}
    return dict(msgspec.json.decode(msgspec.json.encode(found)))  # defaults as JSON has them


def reference(kind: type) -> dict[str, Any]:
    return {"$ref": _REF + kind.__name__}


def operation(
    answer: type | None,
    body: type | None = None,
    *,
    streams: bool = False,
    deferrable: bool = False,
    parameters: Sequence[dict[str, Any]] = (),
    error: type = ErrorEnvelope,
) -> dict[str, Any]:
    """The part of a route's OpenAPI entry that says what goes in and out. `parameters` are those of the query."""
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": reference(answer)}
    if streams:
        text = {
            "description": "Server-sent events.",
            "type": "object",
            "required": ["data"],
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        }
        content["text/event-stream"] = {"schema": text}
    entry: dict[str, Any] = {
        "responses": {
            "200": {"description": "OK", **({"content": content} if content else {})},
            "default": {
                "description": "What went wrong",
                "content": {"application/json": {"schema": reference(error)}},
            },
        }
    }
    if deferrable:
        job = {"application/json": {"schema": reference(deferred.Job)}}
        entry["responses"]["202"] = {"description": "Deferred", "content": job}
    if parameters:
        entry["parameters"] = list(parameters)
    if body is not None:
        entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference(body)}}}
    return entry


def download() -> dict[str, Any]:
    """The entry of a route whose answer is the bytes of a file."""
    entry = operation(None)
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    entry["responses"]["200"]["content"] = content
    return entry


def page(spec: dict[str, Any], model: str, url: str) -> str:
    """The description as one HTML page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(spec['info']['title'])} API</title><style>{_STYLE}</style>",
        f"<h1>{escape(spec['info']['title'])} <span class=dim>{escape(spec['info']['version'])}</span></h1>",
        f"<p>{escape(spec['info']['description'])} Machine-readable: <a href=openapi.json>openapi.json</a>.</p>",
        f"<pre>{escape(_example(model, url))}</pre><h2>Endpoints</h2>",
    ]
    for path, methods in spec["paths"].items():
        for method, entry in methods.items():
            parts.append(_endpoint(method, path, entry))
    parts.append("<h2>Types</h2>")
    for name, described in sorted(spec["components"]["schemas"].items()):
        parts.append(_type(name, described))
    return "".join(parts)


def _example(model: str, url: str) -> str:
    return (
        f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'  -d \'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def _endpoint(method: str, path: str, entry: dict[str, Any]) -> str:
    lines = []
    body = entry.get("requestBody")
    if body:
        [(media, sent)] = body["content"].items()
        lines.append(f"<p>Body: {_kind(sent['schema'])} <span class=dim>{escape(media)}</span></p>")
    for status, response in entry.get("responses", {}).items():
        kinds = [
            f"{_kind(media['schema'])} <span class=dim>{escape(name)}</span>" if "$ref" in media["schema"]
            else f"<code>{escape(name)}</code>"
            for name, media in response.get("content", {}).items()
        ]  # fmt: skip
        lines.append(f"<p>{escape(status)}: {' or '.join(kinds) or escape(response['description'])}</p>")
    about = f"<span class=dim>{escape(entry.get('description', ''))}</span>"
    summary = f"<summary><b>{method.upper()}</b> <code>{escape(path)}</code> {about}</summary>"
    return f"<details>{summary}{''.join(lines)}</details>"


def _type(name: str, described: dict[str, Any]) -> str:
    required = set(described.get("required", ()))
    rows = []
    for field, kind in described.get("properties", {}).items():
        star = " *" if field in required else ""
        rows.append(
            f"<tr><td><code>{escape(field)}</code>{star}<td>{_kind(kind)}<td>{_bounds(kind)} {escape(_about(kind))}"
        )
    about = f"<p>{escape(described.get('description', ''))}</p>"
    table = f"<table>{''.join(rows)}</table>" if rows else ""
    return f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary>{about}{table}</details>"


def _kind(kind: dict[str, Any]) -> str:
    if "$ref" in kind:
        name = escape(kind["$ref"].removeprefix(_REF))
        return f"<a href='#{name}'>{name}</a>"
    for several in ("anyOf", "oneOf"):
        if several in kind:
            return " or ".join(_kind(one) for one in kind[several])
    if "enum" in kind:
        return " or ".join(f"<code>{escape(str(one))}</code>" for one in kind["enum"])
    if kind.get("type") == "array":
        return f"list of {_kind(kind.get('items', {}))}"
    return escape(str(kind.get("type", "anything")))


def _bounds(kind: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": "&gt;", "maximum": "≤", "exclusiveMaximum": "&lt;"}
    branches = [kind, *kind.get("anyOf", ())]
    return " ".join(f"{sign} {branch[name]:g}" for branch in branches for name, sign in signs.items() if name in branch)


def _about(kind: dict[str, Any]) -> str:
    branches = [kind, *kind.get("anyOf", ())]
    return next((str(branch["description"]) for branch in branches if "description" in branch), "")
