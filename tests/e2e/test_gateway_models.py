"""Several models in one server: echoes that share memory, and real engines, driven by the openai client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from running import ADMIN, ropeway, serving

from gatewaykit import fine, gateway, upstreams
from ropeway.cli.main import main
from ropeway.contract import Pinned
from ropeway.gateway.table import Route, Rule
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest, TextStream
from waiting import until


def body(model: str, text: str = "Hello") -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


def test_echoes_share_memory_and_answer_alike() -> None:
    echoes = {name: EchoService(model_name=name) for name in ("a", "b")}
    routes = {"one": {"a": 1}, "two": {"b": 1}}
    with gateway(routes, echoes=echoes, budget=1.0, admin_key=ADMIN) as server:
        client = server.client()
        for name, deployment in (("one", "a"), ("two", "b"), ("one", "a")):
            answer = client.chat.completions.with_raw_response.create(**body(name, "Hi there"))
            assert answer.headers["x-ropeway-deployment"] == deployment
            assert answer.parse().choices[0].message.content == "Hi there"
            phases = {place.name: place.phase for place in server.places.values()}
            assert phases == {deployment: "ready", "b" if deployment == "a" else "a": "stopped"}
        chunks = client.completions.create(model="two", prompt="abc", stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"
        with pytest.raises(openai.NotFoundError, match="`one`, `two`"):
            client.chat.completions.create(**body("three"))
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="one", messages=[])
        assert server.counts("a") == {"success": 2, "client_error": 1}


def test_what_names_no_model_is_the_servers() -> None:
    echoes = {name: EchoService(model_name=name) for name in ("a", "b")}
    with gateway({"one": {"a": 1}, "two": {"b": 1}}, echoes=echoes, admin_key=ADMIN) as server:
        http, admin = server.http, {"authorization": f"Bearer {ADMIN}"}
        assert http.get("/readyz").status_code == 200
        assert http.get("/docs").status_code == 200
        stored = [server.client().responses.create(model=name, input=f"for {name}") for name in ("one", "two")]
        for one in stored:  # kept in one store, whichever model has answered
            assert server.client().responses.retrieve(one.id).output_text == one.output_text
        tokens = http.post("/tokenize", json={"model": "two", "prompt": "abc"}).json()
        assert tokens["count"] == 4  # with the one that begins a text
        listed = http.get("/v1/requests").json()["data"]
        assert {one["model"] for one in listed} == {"a", "b"}
        assert http.get("/admin/scheduler", headers=admin).status_code == 400
        assert http.get("/admin/scheduler", params={"model": "a"}, headers=admin).status_code == 200
        assert http.get("/admin/scheduler", params={"model": "a"}).status_code == 401
        assert http.get("/v1/chat/completions").status_code == 405
        wrong = http.post("/v1/messages", content=b"{")
        assert (wrong.status_code, wrong.json()["type"]) == (400, "error")


def test_a_pin_is_put_into_the_model_that_it_names() -> None:
    class Pinning(EchoService):
        async def pin(self, name: str = "", request: TextRequest | None = None) -> list[Pinned]:
            pinned[self.model_name] = name, request and request.text
            return []

    pinned: dict[str, tuple[str, str | None]] = {}
    echoes = {name: Pinning(model_name=name) for name in ("a", "b")}
    with gateway({"one": {"a": 1}, "two": {"b": 1}}, echoes=echoes, admin_key=ADMIN) as server:

        def put(**fields: str) -> httpx2.Response:
            asked = {"prompt": "You are helpful.", **fields}
            return server.http.put("/admin/pins/system", json=asked, headers={"authorization": f"Bearer {ADMIN}"})

        cold = put(model="b")
        assert (cold.status_code, cold.headers["retry-after"]) == (503, "5")
        assert "is stopped" in cold.json()["error"]["message"], "nothing is loaded for that"
        assert server.client().chat.completions.create(**body("two")).choices
        assert put(model="b").status_code == 200
        assert pinned == {"b": ("system", "You are helpful.")}
        for wrong in ({}, {"model": "two"}):
            refused = put(**wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    with gateway({"one": {"a": 1}}, echoes={"a": echoes["a"]}, admin_key=ADMIN) as server:
        assert server.client().chat.completions.create(**body("one")).choices
        assert put().status_code == 200, "there is only one"
        assert pinned["a"] == ("system", "You are helpful.")


def test_a_bug_of_one_model_costs_no_answer_where_there_is_another() -> None:
    class Buggy(EchoService):
        async def submit(self, request: TextRequest) -> TextStream:
            raise KeyError("/root/secret")

    echoes = {"buggy": Buggy(model_name="buggy"), "good": EchoService(model_name="good")}
    with gateway({"chat": {"buggy": 2, "good": 1}, "buggy": {"buggy": 1}}, echoes=echoes) as server:
        answer = server.http.post("/v1/chat/completions", json=body("chat"))
        assert (answer.status_code, answer.headers["x-ropeway-deployment"]) == (200, "good")
        assert (server.counts("buggy"), server.counts("good")) == ({"failure": 1}, {"success": 1})
        alone = server.http.post("/v1/chat/completions", json=body("buggy"))
        assert (alone.status_code, alone.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in alone.text


def test_a_prompt_is_counted_where_a_tokenizer_is_at_hand() -> None:
    """The echo's tokens are bytes: four times as many as the estimate."""
    route = Route(name="chat", targets={"a": 1}, rules=[Rule(least=100, targets={"large": 1})])
    with upstreams(fine) as (large,):
        with gateway(
            {"chat": route}, echoes={"a": EchoService(model_name="a")}, remotes={"large": large.remote()}
        ) as server:
            ask = server.client().chat.completions.with_raw_response.create
            led = [ask(**body("chat", "x" * size)).headers["x-ropeway-deployment"] for size in (200, 200, 90)]
            assert led == ["a", "large", "a"]  # before the model was in memory it was estimated


def test_deferred_requests_take_the_same_ways(tmp_path: Path) -> None:
    """Checked at once where a model is in memory that can, and answered as any other request."""
    echoes = {"a": EchoService(model_name="a")}
    with upstreams(fine) as (other,):
        remotes = {"far": other.remote()}
        routes = {"near": {"a": 1}, "far": {"far": 1}}
        with gateway(routes, echoes=echoes, remotes=remotes, data_dir=str(tmp_path)) as server:
            post = server.http.post
            later = {**body("near", "later"), "deferred": True}
            assert post("/v1/chat/completions", json={**later, "model": "nowhere"}).status_code == 404
            accepted = [
                post("/v1/chat/completions", json=later),
                post("/v1/chat/completions", json={**later, "model": "far"}),
            ]
            assert [one.status_code for one in accepted] == [202, 202]
            said = []
            for one in accepted:
                path = one.headers["location"]
                job = until(lambda path=path: ended(server.http.get(path).json()))
                said.append(job["response"]["body"]["choices"][0]["message"]["content"])
            assert said == ["later", "fine"]
            [sent] = other.requests  # the check was not sent there
            assert sent.json["model"] == "theirs"
            wrong = post("/v1/chat/completions", json={**later, "temperature": "hot"})
            assert wrong.status_code == 400


def ended(job: dict[str, Any]) -> dict[str, Any] | None:
    return job if job["status"] in ("completed", "failed") else None


TABLE = """
memory_gib: 0.2
deployments:
  quick:
    model: bundled
    memory_gib: 0.1
    max_num_seqs: 4
    warm_up: ["A cable car"]
  careful:
    model: bundled
    memory_gib: 0.1
    seed: 7
  spare:
    model: bundled
    memory_gib: 0.15
    start: lazy
routes:
  chat: {targets: {quick: 1, careful: 1}, balance: weighted}
  careful: careful
  spare: spare
"""


def test_a_server_that_cannot_have_its_models_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text("deployments: {a: {model: ./none}}")
    done = ropeway("serve", "--routes", "routes.yaml", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("RW-MODEL: ")


def test_a_model_and_a_table_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "bundled", "--routes", "routes.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("RW-CFG: MODEL is given with --routes")


@pytest.mark.slow
async def test_real_engines(tmp_path: Path) -> None:
    table = tmp_path / "routes.yaml"
    table.write_text(TABLE)
    flags = ("--routes", str(table), "--threads", "1", "--admin-key", ADMIN, "--data-dir", str(tmp_path / "data"))
    with serving(*flags, small=()) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["chat", "careful", "spare"]
        used = []
        for _ in range(4):
            answer = await client.chat.completions.with_raw_response.create(
                **body("chat"), max_tokens=4, seed=1, temperature=0
            )
            used.append(answer.headers["x-ropeway-deployment"])
            assert answer.parse().usage.completion_tokens == 4
        assert sorted(used) == ["careful", "careful", "quick", "quick"]
        assert len(server.engines) == 2
        own = httpx2.AsyncClient(base_url=server.url, headers={"authorization": f"Bearer {ADMIN}"})
        async with client, own as admin:
            text = (await admin.get("/metrics")).text
            for name in ("quick", "careful"):
                assert re.search(rf'vllm:generation_tokens_total{{engine="0",model_name="{name}"}} [1-9]', text)
            assert text.count("# TYPE vllm:generation_tokens_total") == 1
            # Whoever watches is told of the models in memory, each with its own seats, by the names of the metrics.
            hello, *frames = told((await admin.get("/ui/feed?frames=1")).text)
            assert {one["model"]: one["slots"] for one in hello["engines"]} == {"quick": 4, "careful": 64}
            assert {one["model"] for one in frames} == {"quick", "careful"}
            # The third model needs the room of both others, which nobody uses.
            stream = await client.completions.create(model="spare", prompt="Once", max_tokens=5, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream])
            state = {one["name"]: one for one in (await admin.get("/admin/deployments")).json()["data"]}
            assert {name: one["phase"] for name, one in state.items()} == {
                "quick": "stopped", "careful": "stopped", "spare": "ready",
            }  # fmt: skip
            assert len(server.engines) == 1
            # An engine that dies is its deployment's failure; the server stays, and so do the others.
            server.engines[0].kill()
            assert (await client.completions.create(model="careful", prompt="Once", max_tokens=2)).usage
            stopped = await admin.post("/admin/deployments/careful/stop")
            assert stopped.json()["takes_requests"] is False
            with pytest.raises(openai.InternalServerError, match="taken out of service"):
                await client.completions.create(model="careful", prompt="Once", max_tokens=2)
            assert (await admin.post("/admin/deployments/none/stop")).status_code == 404
            started = await admin.post("/admin/deployments/careful/start")
            assert started.json()["takes_requests"] is True
            assert (await client.completions.create(model="careful", prompt="Once", max_tokens=2)).usage
    assert server.process.returncode == 0


def told(stream: str) -> list[dict[str, Any]]:
    """The data of server-sent events."""
    return [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
