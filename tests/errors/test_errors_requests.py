"""Requests that are refused: what a client is told over HTTP, and that it is never a failure of the server's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aloud import Book, check_words, errors_of

from apiserver import INFO, TEXT, Server, over, running
from ropeway.accounts import Limits, keys
from ropeway.accounts.accounts import open_accounts
from ropeway.config import EngineConfig
from ropeway.contract.channel import LinkState
from ropeway.engine.engine import Engine
from ropeway.service.echo import EchoService
from ropeway.sim import FakeExecutor
from ropeway.text.template import ChatTemplate
from waiting import until

LIMITS = {
    "slow": Limits(requests_per_minute=1),
    "small": Limits(tokens_per_minute=50),
    "brief": Limits(max_prompt_tokens=4),
    "other": Limits(models=("another-model",)),
    "paid": Limits(budget_cost=1.0),
    "spent": Limits(budget_tokens=3),
    "revoked": Limits(),
}
"""Keys by their names."""


@dataclass(frozen=True)
class Sent:
    """A request to a server (one of `servers`). `key` is the name of a key, or a key; `upload` a file of a form."""

    path: str
    body: Any = None
    server: str = "echo"
    method: str = "POST"
    key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    upload: tuple[str, str] | None = None
    """Name and purpose."""

    def __str__(self) -> str:
        text = self.body if isinstance(self.body, bytes) else json.dumps(self.body) if self.body is not None else ""
        if self.upload is not None:
            text = f"file={self.upload[0]} purpose={self.upload[1]}"
        shown = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text
        head = " ".join(f"{name}: {value}" for name, value in self.headers.items())
        with_key = f"key: {self.key}" if self.key else ""
        short = shown if len(shown) <= 160 else shown[:120] + " ..."
        return " ".join(part for part in (self.method, self.path, with_key, head, short) if part)


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def ask(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", **fields}


def say(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]

BODIES: dict[str, Sent] = {
    "a body that is not JSON": Sent(CHAT, b'{"messages": ['),
    "no body": Sent(CHAT, b""),
    "a list for a body": Sent(CHAT, []),
    "a body that is not UTF-8": Sent(CHAT, b'{"messages": "\xff"}'),
    "a body that is compressed": Sent(CHAT, b"x", headers={"content-encoding": "gzip"}),
    "a body that is too large": Sent(COMPLETE, ask(prompt="x" * 300_000)),
    "a body that nests too deeply": Sent(COMPLETE, b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}"),
    "a model that is not served": Sent(CHAT, say(model="gpt-4o")),
    "no messages": Sent(CHAT, {"model": "echo"}),
    "messages that are empty": Sent(CHAT, {"messages": []}),
    "messages as a text": Sent(CHAT, {"messages": "hello"}),
    "a role that does not exist": Sent(CHAT, {"messages": [{"role": "boss", "content": "hello"}]}),
    "a picture": Sent(CHAT, {"messages": PICTURE}),
    "a number as a text": Sent(CHAT, say(temperature="hot")),
    "a temperature that is too high": Sent(CHAT, say(temperature=9)),
    "no token to generate": Sent(CHAT, say(max_tokens=0)),
    "more tokens than the context has": Sent(CHAT, say(max_tokens=100_000)),
    "a prompt that is too long": Sent(COMPLETE, ask(prompt="x" * 5000)),
    "a prompt without text": Sent(COMPLETE, ask(prompt="")),
    "prompts of two kinds": Sent(COMPLETE, ask(prompt=["a", 1])),
    "a token that does not exist": Sent(COMPLETE, ask(prompt=[70_000])),
    "too many answers": Sent(COMPLETE, ask(n=100_000)),
    "too many stops": Sent(CHAT, say(stop=["a"] * 100)),
    "a bias on no token": Sent(CHAT, say(logit_bias={"word": 1})),
    "alternatives without log probabilities": Sent(CHAT, say(top_logprobs=3)),
    "fewer to choose from than wanted": Sent(COMPLETE, ask(n=3, best_of=2)),
    "options of a stream without a stream": Sent(CHAT, say(stream_options={"include_usage": True})),
    "a format that does not exist": Sent(CHAT, say(response_format={"type": "xml"})),
    "a schema that is missing": Sent(CHAT, say(response_format={"type": "json_schema"})),
    "a schema that refers outside": Sent(CHAT, say(response_format=schema({"$ref": "https://example.org/x"}))),
    "vLLM's old name for formats": Sent(CHAT, say(guided_json={})),
    "two formats at once": Sent(CHAT, say(response_format={"type": "json_object"}, structured_outputs={"regex": "a+"})),
    "tools that the model cannot call": Sent(
        CHAT, say(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
    ),
    "a template of one's own": Sent(CHAT, say(chat_template="{{ messages }}")),
    "a priority that does not exist": Sent(CHAT, say(), headers={"x-ropeway-priority": "now"}),
    "Anthropic's API without max_tokens": Sent("/v1/messages", say(model="echo")),
    "vectors of a model that makes none": Sent("/v1/embeddings", {"input": "hello"}, server="plain"),
    "more numbers than a vector has": Sent("/v1/embeddings", {"input": "hello", "dimensions": 4096}),
    "an answer to go on from that is not kept": Sent(
        "/v1/responses", {"input": "hi", "previous_response_id": "resp_0"}
    ),
    "a request that is not known": Sent("/v1/requests/req_0", method="GET"),
    "a path that does not exist": Sent("/v1/chat/completion", say()),
    "a method that is not for this path": Sent(CHAT, method="GET"),
    "a name that the server does not have": Sent("/v1/models", method="GET", headers={"host": "llm.example"}),
    "a page of another origin": Sent(COMPLETE, ask(), headers={"origin": "https://evil.example"}),
    "a conversation without a chat template": Sent(CHAT, say(), server="fake"),
    "more KV cache than there is": Sent(COMPLETE, ask(prompt="x" * 100, max_tokens=400), server="fake"),
    "a chat template that fails": Sent(CHAT, say(), server="broken"),
    "messages that the chat template refuses": Sent(CHAT, say(), server="strict"),
    "a file without a form": Sent("/v1/files", {"file": "x"}),
    "a file for another purpose": Sent("/v1/files", upload=("a.jsonl", "fine-tune")),
    "a file that is no JSONL": Sent("/v1/files", upload=("a.csv", "batch")),
    "a file that is not there": Sent("/v1/files/file-0", method="GET"),
    "a batch of a file that is not there": Sent(
        "/v1/batches", {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h"}
    ),
    "a batch for an endpoint that has none": Sent(
        "/v1/batches", {"input_file_id": "file-0", "endpoint": "/v1/images", "completion_window": "24h"}
    ),
    "a window that is too long": Sent(
        "/v1/batches", {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "900d"}
    ),
    "a deferred request that streams": Sent(CHAT, say(deferred=True, stream=True)),
    "a callback without anything deferred": Sent(CHAT, say(callback_url="https://a.example/")),
    "a callback over http": Sent(CHAT, say(deferred=True, callback_url="http://a.example/")),
    "a callback to the inside": Sent(CHAT, say(deferred=True, callback_url="https://10.0.0.1/")),
    "a callback to another port": Sent(CHAT, say(deferred=True, callback_url="https://a.example:22/")),
    "a job that is not there": Sent("/v1/jobs/job_0", method="GET"),
    "a disk that cannot be written": Sent("/v1/files", upload=("a.jsonl", "batch"), server="full"),
    "administration without an administrator": Sent("/admin/keys", method="GET"),
    "deployments without routes": Sent("/admin/deployments", method="GET", server="guarded", key="owner"),
    "no key": Sent(CHAT, say(), server="guarded"),
    "a wrong key": Sent(CHAT, say(), server="guarded", key="sk-wrong"),
    "a key that was revoked": Sent(CHAT, say(), server="guarded", key="revoked"),
    "a client's key for the administrator's paths": Sent("/admin/keys", method="GET", server="guarded", key="first"),
    "a key for other models": Sent(CHAT, say(model="echo"), server="guarded", key="other"),
    "a prompt that is too long for the key": Sent(COMPLETE, ask(), server="guarded", key="brief"),
    "more tokens than the key may use at once": Sent(COMPLETE, ask(max_tokens=200), server="guarded", key="small"),
    "a budget in money and no price": Sent(COMPLETE, ask(), server="guarded", key="paid"),
    "a budget that is spent": Sent(COMPLETE, ask(), server="guarded", key="spent"),
    "a server that is being stopped": Sent(CHAT, say(), server="leaving"),
    "an engine that has died": Sent(CHAT, say(), server="dead"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def secrets(folder: Path) -> dict[str, str]:
    """The keys in `LIMITS`, and what stands for itself."""
    made = {}
    store = open_accounts(folder / "guarded")
    for name, limits in LIMITS.items():
        made[name] = store.write_now(lambda c, name=name, limits=limits: keys.create(c, name, limits))[0]
    store.write_now(lambda connection: keys.revoke(connection, "revoked"))
    store.close()
    return made


@pytest.fixture(scope="module")
def servers(folder: Path, secrets: dict[str, str]) -> Iterator[dict[str, Server]]:
    """Servers by what is the matter with them; all are echoes but one, whose engine has hardly any memory."""
    (folder / "a-file").touch()
    leaving, dead = EchoService(), EchoService()
    leaving.state, dead.state = LinkState.DRAINING, LinkState.DEAD
    broken = ChatTemplate("{{ messages[0].content.text.strip() }}")
    strict = ChatTemplate("{{ raise_exception('Only one user speaks here') }}")
    services = {
        "echo": EchoService(),
        "plain": EchoService(pooling=None),
        "broken": EchoService(template=broken),
        "strict": EchoService(template=strict),
        "leaving": leaving,
        "dead": dead,
    }
    with ExitStack() as stack:
        for template in (broken, strict):
            stack.callback(template.close)
        up = {
            name: stack.enter_context(running(service, max_body_mib=0.25, data_dir=str(folder / name)))
            for name, service in services.items()
        }
        guard = {"api_key": "first", "admin_key": "owner", "data_dir": str(folder / "guarded")}
        up["guarded"] = stack.enter_context(running(EchoService(), **guard))
        up["full"] = stack.enter_context(running(EchoService(), data_dir=str(folder / "a-file" / "data")))
        engine = Engine(FakeExecutor(msgspec.structs.replace(INFO, num_blocks=8)), EngineConfig(max_num_seqs=2))
        up["fake"] = stack.enter_context(over(engine, TEXT, data_dir=str(folder / "fake")))
        yield up


def send(server: Server, sent: Sent, secrets: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    headers = dict(sent.headers)
    if sent.key:
        headers["authorization"] = f"Bearer {secrets.get(sent.key, sent.key)}"
    what: dict[str, Any] = {"json": sent.body}
    if sent.upload is not None:
        what = {"files": {"file": (sent.upload[0], b"{}")}, "data": {"purpose": sent.upload[1]}}
    elif isinstance(sent.body, bytes):
        what = {"content": sent.body}
        headers.setdefault("content-type", "application/json")
    elif sent.body is None:
        what = {}
    response = server.http.request(sent.method, sent.path, headers=headers, **what)
    assert response.headers["x-request-id"]
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize("title", BODIES)
def test_what_is_asked_wrongly(title: str, servers: dict[str, Server], secrets: dict[str, str], update: bool) -> None:
    sent = BODIES[title]
    status, error = send(servers[sent.server], sent, secrets)
    if title not in ("a disk that cannot be written", "a server that is being stopped", "an engine that has died"):
        assert 400 <= status < 500, error
    check_words(error["message"])
    entry = f"{sent}\n{status} {error.get('code') or error['type']}: {error['message']}"
    if error.get("param"):
        entry += f"\nparam: {error['param']}"
    Book("requests").check(title, entry, [*BODIES, *LATER], update=update)


LATER = ["a second request in a minute", "a batch with lines that are none"]


def test_a_key_that_is_too_fast(servers: dict[str, Server], secrets: dict[str, str], update: bool) -> None:
    sent = Sent(COMPLETE, ask(max_tokens=1), server="guarded", key="slow")
    headers = {"authorization": f"Bearer {secrets['slow']}"}
    assert servers["guarded"].http.post(COMPLETE, json=sent.body, headers=headers).status_code == 200
    status, error = send(servers["guarded"], sent, secrets)
    entry = f"{sent}\n{status} {error['code']}: {_seconds(error['message'])}"
    Book("requests").check(LATER[0], entry, [*BODIES, *LATER], update=update)
    check_words(error["message"])


def test_a_batch_whose_file_is_wrong(servers: dict[str, Server], update: bool) -> None:
    """The file is taken, and read afterwards: what is wrong with its lines stands in the batch."""
    right = {"custom_id": "a", "method": "POST", "url": CHAT, "body": say(model="echo")}
    lines = [
        json.dumps(right), "{", json.dumps(right), json.dumps({**right, "custom_id": "b", "method": "GET"}),
        json.dumps({**right, "custom_id": "c", "url": COMPLETE}),
        json.dumps({**right, "custom_id": "d", "body": say(model="echo", stream=True)}),
        json.dumps({**right, "custom_id": "e", "body": say(model="gpt-4o")}),
    ]  # fmt: skip
    client = servers["echo"].client()
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    batch = until(lambda: client.batches.retrieve(made.id), lambda one: one.status != "validating")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    told = [f"line {one.line}: {one.code}: {one.message}" for one in batch.errors.data]
    Book("requests").check(LATER[1], "\n".join(["POST /v1/batches", *told]), [*BODIES, *LATER], update=update)
    for one in batch.errors.data:
        check_words(one.message or "")


def _seconds(text: str) -> str:
    """`text` with each time that is left as if it were a minute."""
    return re.sub(r"[\d.]+ ?s\b", "60 s", text)


def test_the_book_has_nothing_else() -> None:
    assert list(Book("requests").entries) == [*BODIES, *LATER]


def test_nobody_learns_whether_a_key_was_ever_valid() -> None:
    said = errors_of(Book("requests").entries)
    assert said.pop("a key that was revoked") == said["a wrong key"]
    assert len(set(said.values())) == len(said), "two mistakes are not told apart"
