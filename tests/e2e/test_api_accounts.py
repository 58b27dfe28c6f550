"""Keys, limits, budgets, usage and cost over HTTP."""

from __future__ import annotations

import asyncio
import csv
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import msgspec
import openai
import pytest
from running import ropeway

from accountkit import auth, new_key, used
from apiserver import Server, running
from ropeway.accounts import keys
from ropeway.accounts.accounts import open_accounts
from ropeway.api.inside import URLS, Inside
from ropeway.api.middleware import ADMIN, PUBLIC, SHARED
from ropeway.api.ui import HOMES
from ropeway.jobs.work import Call, Reply
from ropeway.service.echo import EchoService
from waiting import until

PRICES = "currency: EUR\nmodels:\n  echo: {input: 2, cached: 1, output: 10}\n"
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "hello", "max_tokens": 3},
    "/v1/responses": {"input": "hello", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    "/v1/embeddings": {"input": ["hello", "you"]},
    "/v1/score": {"text_1": "hello", "text_2": "you"},
    "/v1/rerank": {"query": "hello", "documents": ["you", "me"]},
}
"""A request for every endpoint that computes."""

MORE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ["hello", "you"], "n": 2, "best_of": 3, "max_tokens": 3}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True}),
    (CHAT, {**BODIES[CHAT], "n": 3}),
    (CHAT, {**BODIES[CHAT], "stream": True}),
    ("/v1/completions", {"prompt": "hello", "n": 2, "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"prompt": "hello", "n": 2, "max_tokens": 3, "use_beam_search": True}),
    ("/v1/responses", {**BODIES["/v1/responses"], "background": True}),
    ("/v1/messages", {**BODIES["/v1/messages"], "stream": True}),
    ("/score", BODIES["/v1/score"]),
    ("/rerank", BODIES["/v1/rerank"]),
    ("/v2/rerank", BODIES["/v1/rerank"]),
]
"""And for every other way through them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accounts")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    (folder / "prices.yaml").write_text(PRICES)
    new_key(folder, "first")  # so that the server is closed from its first moment on
    with running(
        EchoService(), data_dir=str(folder), prices=str(folder / "prices.yaml"), admin_key="owner", api_key="fixed"
    ) as up:
        yield up


@pytest.fixture(scope="module")
def key(folder: Path) -> Callable[..., str]:
    """Makes a key with limits."""
    return lambda **limits: new_key(folder, uuid4().hex, **limits)[0]


def test_every_route_asks_who_one_is(server: Server, folder: Path) -> None:
    """All routes there are, found by asking the application, for nobody, strangers, former clients, clients and the
    administrator."""
    user, _ = new_key(folder, "user")
    revoked, _ = new_key(folder, "former")
    expired, _ = new_key(folder, "late", expires=int(time.time()) - 1)
    with closing(open_accounts(folder)) as store:
        store.write_now(lambda connection: keys.revoke(connection, "former"))
    wrong = [None, "", "wrong", user[:-1], user + "x", user.upper(), f"{user},{user}", revoked, expired]
    routes = {(getattr(route, "path", ""), method) for route in server.app.routes for method in route.methods}  # type: ignore[attr-defined]
    assert len(routes) > 30
    for path, method in sorted(routes):
        url = path.replace(":path", "").replace("{", "").replace("}", "")

        def status(presented: str | None, url: str = url, method: str = method) -> int:
            headers = {} if presented is None else {"authorization": f"Bearer {presented}".strip()}
            with server.http.stream(method, url, headers=headers) as answer:  # some have no end
                return answer.status_code

        if path in PUBLIC:
            assert {status(one) for one in (*wrong, user, "owner", "fixed")} == {307 if path in HOMES else 200}, path
            continue
        assert {status(one) for one in wrong} == {401}, (method, path)
        client = {status(user), status("fixed")}
        assert client == {403} if path.startswith(ADMIN) else not client & {401, 403}, (method, path, client)
        operator = status("owner")
        if path.startswith((ADMIN, *SHARED)):
            assert operator not in (401, 403), (method, path)
        else:
            assert operator == 401, "the administrator's key is for administration"


@pytest.mark.parametrize("url", sorted(URLS))
def test_every_endpoint_that_computes_takes_from_the_same_limits(
    server: Server, folder: Path, key: Callable[..., str], url: str
) -> None:
    poor, other, small = key(tokens_per_minute=1), key(models=("gpt-9",)), key(max_prompt_tokens=1)
    refused = server.http.post(url, json=BODIES[url], headers=auth(poor))
    assert refused.status_code == 429, refused.text
    assert refused.headers["x-should-retry"] == "false", "it can never fit"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "1"
    unknown = server.http.post(url, json=BODIES[url], headers=auth(other))
    assert unknown.status_code == 404
    assert "does not exist or you do not have access" in unknown.text
    long = server.http.post(url, json=BODIES[url], headers=auth(small))
    assert long.status_code == 400
    assert "may have 1 tokens" in long.text
    assert not used(folder, by=("key",), key=id_of(folder, poor)), "what was refused costs nothing"


@pytest.mark.parametrize(("url", "body"), [*BODIES.items(), *MORE], ids=lambda value: str(value)[:40])
def test_what_is_left_is_what_was_not_used(
    server: Server, folder: Path, key: Callable[..., str], url: str, body: dict[str, Any]
) -> None:
    """The client's account, the headers and the ledger agree to the token, once the answer is complete."""
    begun = time.monotonic()
    limited = key(tokens_per_minute=600, requests_per_minute=100)
    answer = server.http.post(url, json=body, headers=auth(limited))
    assert answer.status_code == 200, answer.text

    def settled() -> list[Any]:
        server.http.get("/v1/usage", headers=auth(limited))  # which writes what is pending
        return used(folder, by=(), key=id_of(folder, limited))

    [row] = until(settled)
    after = server.http.get("/v1/models", headers=auth(limited))
    assert row.requests == 1
    left = int(after.headers["x-ratelimit-remaining-tokens"])
    assert 0 <= left - (600 - row.total_tokens) <= 10 * (time.monotonic() - begun) + 1, "ten a second come back"
    assert after.headers["x-ratelimit-limit-requests"] == "100"
    assert int(after.headers["x-ratelimit-remaining-requests"]) in (99, 100)
    assert row.cost == pytest.approx((row.prompt_tokens * 2 + row.completion_tokens * 10) / 1e6)
    if not (body.get("stream") or body.get("background")):
        said = answer.json()["usage"]
        prompt = said.get("prompt_tokens", said.get("input_tokens"))
        written = said.get("completion_tokens", said.get("output_tokens", 0))
        if "best_of" not in body:
            assert (row.prompt_tokens, row.completion_tokens) == (prompt, written or 0)
        assert float(answer.headers["x-ropeway-cost"]) == row.cost
        assert "e" not in answer.headers["x-ropeway-cost"]


def id_of(folder: Path, secret: str) -> str:
    with closing(open_accounts(folder)) as store:
        account = store.read_now(lambda connection: keys.find(connection, keys.digest_of(secret.encode())))
    assert account is not None
    return account.id


def test_too_many_requests_are_told_when_to_come_back(server: Server, key: Callable[..., str]) -> None:
    """And a client that does what it is told gets through."""
    limited = key(requests_per_minute=60)
    with httpx2.Client(base_url=server.url, headers=auth(limited)) as http:
        begun = time.monotonic()
        answers = [http.post("/tokenize", json={"prompt": "x"}) for _ in range(100)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert 60 <= len(answers) - len(refused) <= 60 + (time.monotonic() - begun)
        assert refused
        last = refused[-1]
        error = last.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
        assert last.headers["x-ratelimit-remaining-requests"] == "0"
        assert last.headers["retry-after"] == "1"
        time.sleep(int(last.headers["retry-after-ms"]) / 1000)
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200
        assert http.get("/v1/models").status_code == 200, "to look is free"


def test_the_openai_client_understands_all_of_it(server: Server, key: Callable[..., str]) -> None:
    hello: Any = [{"role": "user", "content": "hello"}]

    def ask(secret: str, **fields: Any) -> Any:
        return server.client(api_key=secret).chat.completions.with_raw_response.create(
            model="echo", messages=hello, **{"max_tokens": 3, **fields}
        )

    told = ask(key(requests_per_minute=10, tokens_per_minute=1000))
    names = {name for name in told.headers if name.startswith("x-ratelimit-")}
    assert names == {
        f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
    }
    assert re.fullmatch(r"[1-6](\.\d+)?s", told.headers["x-ratelimit-reset-requests"])
    with pytest.raises(openai.AuthenticationError):
        ask("rw-nobody")
    with pytest.raises(openai.NotFoundError) as missing:
        ask(key(models=("other",)))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(key(max_prompt_tokens=2))
    assert long.value.code == "context_length_exceeded"
    tokens = key(tokens_per_minute=20)
    ask(tokens, max_tokens=10)
    with pytest.raises(openai.RateLimitError) as busy:
        ask(tokens, max_tokens=12)
    assert (busy.value.type, busy.value.code) == ("tokens", "rate_limit_exceeded")
    assert int(busy.value.response.headers["retry-after-ms"]) > 0
    spent = key(budget_tokens=10)
    ask(spent)
    with pytest.raises(openai.RateLimitError) as over:
        ask(spent)
    assert (over.value.type, over.value.code) == ("insufficient_quota", "insufficient_quota")
    assert over.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.RateLimitError):
        ask(key(budget_cost=0.00001))
    dollars = server.client(api_key=key(budget_cost=0.0001)).chat.completions.create(
        model="echo", messages=hello, max_tokens=3
    )
    assert dollars.usage is not None


def test_anthropics_client_is_told_in_its_own_words(server: Server, key: Callable[..., str]) -> None:
    limited = key(requests_per_minute=1)
    for status in (200, 429):
        answer = server.http.post("/v1/messages", json=BODIES["/v1/messages"], headers={"x-api-key": limited})
        assert answer.status_code == status
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_stream_that_is_broken_off_pays_what_it_used(folder: Path) -> None:
    with running(EchoService(delay=0.05), data_dir=str(folder)) as slow:
        limited, account = new_key(folder, "broken-off", tokens_per_minute=1000, concurrency=1)
        body = {"prompt": "x" * 300, "max_tokens": 300, "stream": True}
        begun = time.monotonic()
        with slow.http.stream("POST", "/v1/completions", json=body, headers=auth(limited)) as stream:
            left = int(stream.headers["x-ratelimit-remaining-tokens"])
            assert 400 <= left < 410, "the prompt and the longest answer are set aside"
            lines = (line for line in stream.iter_lines() if line.startswith("data"))
            for _ in range(3):
                next(lines)
            again = slow.http.post("/v1/completions", json=body, headers=auth(limited))
            assert again.status_code == 429
            assert "under way" in again.json()["error"]["message"]
        until(lambda: not slow.call(lambda: slow.api.active))
        left = int(slow.http.get("/v1/models", headers=auth(limited)).headers["x-ratelimit-remaining-tokens"])
        slow.http.get("/v1/usage", headers=auth(limited))
        [row] = used(folder, by=(), key=account.id)
        assert row.prompt_tokens == 300
        assert 2 <= row.completion_tokens < 300
        assert 0 <= left - (1000 - row.total_tokens) <= 1000 / 60 * (time.monotonic() - begun) + 1
        assert (
            slow.http.post("/v1/completions", json={**body, "max_tokens": 1}, headers=auth(limited)).status_code == 200
        )


def test_everybody_sees_what_is_theirs(server: Server, folder: Path, key: Callable[..., str]) -> None:
    mine, theirs = key(), key()
    for secret, count in ((mine, 2), (theirs, 3), ("fixed", 1)):
        for _ in range(count):
            assert server.http.post(CHAT, json=BODIES[CHAT], headers=auth(secret)).status_code == 200

    def seen(secret: str, **query: str) -> Any:
        answer = server.http.get("/v1/usage", params={"by": "key,model", **query}, headers=auth(secret))
        assert answer.status_code == 200, answer.text
        return answer.json()

    own = seen(mine)
    assert own["currency"] == "EUR"
    assert [(row["key"], row["requests"]) for row in own["data"]] == [(id_of(folder, mine), 2)]
    assert [row["requests"] for row in seen(theirs)["data"]] == [3]
    assert all(row["key"] == "" for row in seen("fixed")["data"]), "a fixed key sees its own tenant"
    everybody = {row["key"]: row["requests"] for row in seen("owner")["data"]}
    assert everybody[id_of(folder, mine)] == 2
    assert everybody[id_of(folder, theirs)] == 3
    assert seen("owner", limit="1")["has_more"]
    assert not seen("owner", since="2099-01-01")["data"]
    assert not seen("owner", since=str(int(time.time()) + 7200))["data"]
    assert seen("owner", since=str(int(time.time()) - 7200)) == seen("owner")
    text = server.http.get("/v1/usage?format=csv&by=key", headers=auth(mine))
    assert text.headers["content-type"].startswith("text/csv")
    [line] = csv.DictReader(io.StringIO(text.text))
    assert (line["key"], line["requests"]) == (id_of(folder, mine), "2")
    for wrong in ("by=", "by=secret", "since=soon", "since=2026-13-01", "limit=0", "limit=x", "format=xml"):
        assert server.http.get(f"/v1/usage?{wrong}", headers=auth(mine)).status_code == 400, wrong


def test_models_that_a_key_may_not_use_are_not_there_for_it(server: Server, key: Callable[..., str]) -> None:
    blind, seeing = key(models=("other",)), key(models=("echo", "other"))
    assert server.http.get("/v1/models", headers=auth(blind)).json()["data"] == []
    assert server.http.get("/v1/models/echo", headers=auth(blind)).status_code == 404
    assert [model["id"] for model in server.http.get("/v1/models", headers=auth(seeing)).json()["data"]] == ["echo"]


def test_a_job_is_paid_by_its_key_and_asks_no_rate(server: Server, folder: Path, key: Callable[..., str]) -> None:
    limited = key(requests_per_minute=1, tokens_per_minute=1, concurrency=1)
    account = id_of(folder, limited)
    call = Call(url=CHAT, body=msgspec.json.encode(BODIES[CHAT]), key=account, tenant=account)

    async def run() -> list[Reply]:
        return await asyncio.gather(*(Inside(server.app)(call) for _ in range(5)))

    replies = asyncio.run_coroutine_threadsafe(run(), server._loop).result(60)
    assert [reply.status for reply in replies] == [200] * 5
    totals = [msgspec.json.decode(reply.body)["usage"]["total_tokens"] for reply in replies]
    assert [reply.used.prompt + reply.used.answer for reply in replies if reply.used] == totals
    assert not used(folder, by=("key",), key=account), "it is paid for where its answer is kept"


def test_a_deferred_request_is_paid_by_who_deferred_it(server: Server, key: Callable[..., str]) -> None:
    limited, other = key(requests_per_minute=1, tokens_per_minute=1), key(models=("other",))
    body = {**BODIES[CHAT], "deferred": True, "priority": "low"}
    refused = server.http.post(CHAT, json=body, headers=auth(other))
    assert refused.status_code == 404, "not first when it is computed"
    accepted = server.http.post(CHAT, json=body, headers=auth(limited))
    assert accepted.status_code == 202, accepted.text
    assert accepted.headers["x-ratelimit-remaining-requests"] == "0"
    where = f"/v1/jobs/{accepted.json()['id']}"
    assert server.http.get(where, headers=auth(other)).status_code == 404
    found = until(
        lambda: server.http.get(where, headers=auth(limited)).json(), lambda job: job["status"] == "completed"
    )
    [row] = server.http.get("/v1/usage?by=key", headers=auth(limited)).json()["data"]
    assert (row["requests"], row["total_tokens"]) == (1, found["response"]["body"]["usage"]["total_tokens"])


def test_an_open_server_closes_when_it_gets_its_first_key(tmp_path: Path) -> None:
    """The key is made by the command, in a process of its own."""
    with running(EchoService(), data_dir=str(tmp_path)) as up:
        assert up.http.get("/v1/models").status_code == 200
        where = ("--data-dir", str(tmp_path))
        done = ropeway("keys", "create", "alice", *where, check=True)
        secret = done.stdout.strip()
        assert secret not in done.stderr
        until(lambda: up.http.get("/v1/models").status_code == 401)
        assert up.http.get("/v1/models", headers=auth(secret)).status_code == 200
        ropeway("keys", "revoke", "alice", *where, check=True)
        until(lambda: up.http.get("/v1/models", headers=auth(secret)).status_code == 401)


def test_nobody_s_files_are_made_where_nobody_asked_for_them(tmp_path: Path) -> None:
    with running(EchoService(), data_dir=str(tmp_path / "data")) as up:
        assert up.http.post(CHAT, json=BODIES[CHAT]).status_code == 200
        assert up.http.get("/v1/usage").json()["data"] == []
    assert not (tmp_path / "data").exists()
