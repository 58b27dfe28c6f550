"""Routes, retries and blame, with deployments that are plain applications."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.api.canary_schema import CanaryStart
from ropeway.api.state import Api
from ropeway.config import ServerConfig
from ropeway.contract.channel import LinkState
from ropeway.errors import DrainingError, NotReadyError, OverloadedError, RopewayError, UnknownModelError
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.choice import Way
from ropeway.gateway.deployment import Deployment
from ropeway.gateway.outcome import Outcome, Splitter
from ropeway.gateway.proxy import UpstreamError
from ropeway.gateway.router import Router
from ropeway.gateway.table import Route, Rule, Table
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

PATH = "/v1/chat/completions"


class Plain:
    """A backend whose answers are scripted: a status, an error to raise, or an application; the last one for ever."""

    full = ""
    service = None

    def __init__(self, name: str, *script: int | Exception | ASGIApp) -> None:
        self.model = f"{name}'s own name"
        self.phase = "ready"
        self.refuses: RopewayError | None = None
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self._script = list(script) or [200]

    async def take(self) -> ASGIApp:
        if self.refuses is not None:
            raise self.refuses
        self.open += 1
        return self._app

    def give_back(self) -> None:
        self.open -= 1

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(json.loads((await receive())["body"]))
        now = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(now, Exception):
            raise now
        if isinstance(now, int):
            await send({"type": "http.response.start", "status": now, "headers": [(b"retry-after", b"7")]})
            await send({"type": "http.response.body", "body": b"%d" % now})
        else:
            await now(scope, receive, send)


class Answer:
    """What a client has received."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.complete = False
        self.headers: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0, "an answer has one head"
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)


class World:
    """A router over `backends`, with a clock of the test's."""

    def __init__(
        self,
        routes: Mapping[str, Route | Mapping[str, float]],
        backends: Mapping[str, Plain],
        splitter: Splitter | Callable[[str], Splitter | None] | None = None,
    ) -> None:
        self.now = 1000.0
        self.backends = backends
        self.deployments = {name: Deployment(name, one, self.clock) for name, one in backends.items()}
        made = {
            n: r if isinstance(r, Route) else Route(name=n, targets=r, balance="weighted") for n, r in routes.items()
        }
        self.ways = {name: Way(route) for name, route in made.items()}
        self.api = Api(EchoService(), ServerConfig(), Metrics("echo"))
        self.front: list[str] = []
        self.router = Router(
            self._front,
            Table(deployments={}, routes=made),
            self.deployments,
            self.ways,
            self.api,
            splitter_of=splitter if callable(splitter) else lambda route: splitter,
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.now

    async def _front(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.front.append(scope["path"])

    async def ask(self, body: Mapping[str, Any], *, path: str = PATH, tenant: str = "", **state: Any) -> Answer:
        """Raises what the gate would tell the client."""
        answer = Answer()
        messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        scope = {
            "type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
            "state": {"request_id": "r", "tenant": tenant, **state},
        }  # fmt: skip
        await self.router(scope, receive, answer.send)
        return answer

    def blame(self) -> dict[str, dict[str, int]]:
        """What became of the requests that each deployment was sent."""
        found = {name: {kind: n for kind, n in one.counts.items() if n} for name, one in self.deployments.items()}
        assert all(not one.load for one in self.deployments.values())
        assert all(not one.open for one in self.backends.values())
        return {name: counts for name, counts in found.items() if counts}


def stream(*events: bytes, error: Exception | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if error is not None:
            raise error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def test_a_model_leads_to_its_deployment_under_its_own_name() -> None:
    world = World({"chat": {"a": 1}, "code": {"b": 1}}, {"a": Plain("a"), "b": Plain("b")})
    answer = await world.ask({"model": "code", "seed": 5, "messages": []})
    assert (answer.status, answer.headers["x-ropeway-deployment"]) == (200, "b")
    assert world.backends["b"].asked == [{"model": "b's own name", "seed": 5, "messages": []}]
    assert world.blame() == {"b": {"success": 1}}


async def test_unknown_models_and_other_paths() -> None:
    world = World({"chat": {"a": 1}, "code": {"a": 1}}, {"a": Plain("a")})
    with pytest.raises(UnknownModelError, match="`chat`, `code`"):
        await world.ask({"model": "gpt"})
    with pytest.raises(RopewayError, match="name one"):
        await world.ask({})
    await world.ask({}, path="/v1/files")
    assert world.front == ["/v1/files"]
    assert not world.backends["a"].asked
    lone = World({"chat": {"a": 1}}, {"a": Plain("a")})
    assert (await lone.ask({})).status == 200


@pytest.mark.parametrize(
    "failure",
    [
        429,
        500,
        502,
        503,
        504,
        UpstreamError(502, "gone", "upstream_failed"),
        OverloadedError("full"),
        ValueError("bug"),
    ],
    ids=str,
)
async def test_another_is_asked_while_nothing_has_come(failure: int | Exception) -> None:
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", failure), "b": Plain("b")})
    answer = await world.ask({"model": "chat"})
    assert (answer.status, answer.body, answer.headers["x-ropeway-deployment"]) == (200, b"200", "b")
    kind = "busy" if failure in (429, 503) or isinstance(failure, OverloadedError) else "failure"
    assert world.blame() == {"a": {kind: 1}, "b": {"success": 1}}
    assert world.ways["chat"].retries == 1


@pytest.mark.parametrize("status", [200, 204, 400, 401, 404, 409, 413, 422])
async def test_an_answer_about_the_request_is_the_answer(status: int) -> None:
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", status), "b": Plain("b")})
    assert (await world.ask({"model": "chat"})).status == status
    assert world.blame() == {"a": {"success" if status < 400 else "client_error": 1}}


async def test_the_last_error_reaches_the_client_as_it_was() -> None:
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", 500), "b": Plain("b", 503)})
    answer = await world.ask({"model": "chat"})
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (503, b"503", "7")
    raised = World({"chat": {"a": 1}}, {"a": Plain("a", UpstreamError(502, "gone", "upstream_failed"))})
    with pytest.raises(UpstreamError, match="gone"):
        await raised.ask({"model": "chat"})


async def test_an_answer_that_has_begun_is_not_tried_elsewhere() -> None:
    event = b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'
    broken = UpstreamError(502, "broke off", "upstream_failed", began=True)
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", stream(event, error=broken)), "b": Plain("b")})
    answer = await world.ask({"model": "chat"})
    assert answer.complete
    assert answer.body.startswith(event + b'data: {"error":{"message":"broke off"')
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert world.blame() == {"a": {"failure": 1}}
    # Also if its first bytes never reached the client.
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", broken), "b": Plain("b")})
    with pytest.raises(UpstreamError):
        await world.ask({"model": "chat"})
    assert world.blame() == {"a": {"failure": 1}}


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/v1/messages", b'event: error\ndata: {"type":"error",'),
        ("/v1/responses", b'event: error\ndata: {"type":"error",'),
    ],
)
async def test_a_stream_that_breaks_off_says_so_in_its_dialect(path: str, ending: bytes) -> None:
    broken = UpstreamError(502, "broke off", "upstream_failed", began=True)
    world = World({"chat": {"a": 1}}, {"a": Plain("a", stream(b"event: x\ndata: {}\n\n", error=broken))})
    answer = await world.ask({"model": "chat"}, path=path)
    assert answer.body.startswith(b"event: x\ndata: {}\n\n" + ending)
    json.loads(answer.body.split(b"data: ")[-1])


async def test_an_error_inside_a_stream_is_the_deployments_failure() -> None:
    event = b'data: {"error":{"message":"The engine is gone","type":"server_error","param":null,"code":null}}\n\n'
    wanted = event.replace(b'"code":null', b'"code":"request_cancelled"')
    world = World(
        {"chat": {"a": 1}}, {"a": Plain("a", stream(b"data: {}\n\n", event), stream(b"data: {}\n\n", wanted))}
    )
    for _ in range(2):
        assert (await world.ask({"model": "chat"})).status == 200
    assert world.blame() == {"a": {"failure": 1, "client_gone": 1}}


async def test_retries_stay_within_a_fifth() -> None:
    """Every request fails at both deployments, and the circuits are never given the time to open."""
    a, b = Plain("a", 429), Plain("b", 429)
    world = World({"chat": {"a": 1, "b": 1}}, {"a": a, "b": b})
    for number in range(1, 201):
        assert (await world.ask({"model": "chat"})).status == 429
        assert len(a.asked) + len(b.asked) <= 1.2 * number + 3
    assert len(a.asked) + len(b.asked) >= 1.2 * 200


async def test_an_open_circuit_gets_nothing_and_is_tried_again() -> None:
    a, b = Plain("a", *[500] * 5, 200), Plain("b")
    world = World({"chat": Route(name="chat", targets={"a": 1}, fallbacks=["b"])}, {"a": a, "b": b})
    for _ in range(20):
        await world.ask({"model": "chat"})
    assert len(a.asked) == 5
    assert world.deployments["a"].breaker.state == "open"
    world.now += 5
    for _ in range(3):
        assert (await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] == "a"
    assert world.deployments["a"].breaker.state == "closed"


async def test_nobody_takes_requests() -> None:
    world = World({"chat": {"a": 1, "b": 1}}, {"a": Plain("a", 500), "b": Plain("b")})
    world.deployments["b"].held = True
    for _ in range(5):
        await world.ask({"model": "chat"})
    with pytest.raises(OverloadedError, match=r"a: 5 failures in a row.*b: taken out of service") as refused:
        await world.ask({"model": "chat"})
    assert refused.value.retry_after == pytest.approx(5.0)


async def test_a_busy_deployment_rests_but_is_better_than_nobody() -> None:
    world = World({"chat": {"a": 1, "b": 1}}, {"a": Plain("a", 503, 200), "b": Plain("b")})
    for _ in range(6):
        assert (await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] == "b"
    world.deployments["b"].held = True
    assert (await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] == "a"
    world.deployments["b"].held = False
    world.now += 7  # as it had said
    used = Counter([(await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] for _ in range(10)])
    assert used == {"a": 5, "b": 5}


async def test_a_worse_deployment_is_better_than_none() -> None:
    world = World({"chat": {"a": 1, "b": 1}}, {"a": Plain("a", *[500, 200, 200, 200] * 500), "b": Plain("b")})
    for _ in range(60):
        world.now += 0.1
        await world.ask({"model": "chat"})
    a, b = world.deployments["a"], world.deployments["b"]
    assert "elsewhere" in a.breaker.reason
    assert (await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] == "b"
    b.held = True
    statuses = Counter([(await world.ask({"model": "chat"})).status for _ in range(8)])
    assert statuses == {200: 6, 500: 2}
    assert a.breaker.state == "closed"  # there is nobody who does better


async def test_an_engine_that_is_started_again_is_passed_by() -> None:
    world = World({"chat": {"a": 1, "b": 1}}, {"a": Plain("a"), "b": Plain("b")})
    world.backends["a"].phase = "starting"
    led = {(await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] for _ in range(6)}
    assert led == {"b"}


async def test_a_model_that_cannot_be_loaded_costs_no_retry() -> None:
    world = World({"chat": Route(name="chat", targets={"a": 1}, fallbacks=["b"])}, {"a": Plain("a"), "b": Plain("b")})
    world.backends["a"].refuses = NotReadyError("no weights")
    for _ in range(50):
        assert (await world.ask({"model": "chat"})).headers["x-ropeway-deployment"] == "b"
    assert world.blame() == {"b": {"success": 50}}
    assert world.ways["chat"].retries == 0


async def test_draining_is_not_tried_elsewhere() -> None:
    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", DrainingError("bye")), "b": Plain("b")})
    with pytest.raises(DrainingError):
        await world.ask({"model": "chat"})
    world.api.draining = True
    with pytest.raises(DrainingError):
        await world.ask({"model": "chat"})
    assert not world.backends["b"].asked


async def test_rules_by_tenant_and_by_length() -> None:
    rules = [Rule(tenants=frozenset({"acme"}), targets={"b": 1}), Rule(least=100, targets={"c": 1})]
    route = Route(name="chat", targets={"a": 1}, rules=rules)
    world = World({"chat": route}, {name: Plain(name) for name in "abc"})
    expected = [("", 10, "a"), ("acme", 10, "b"), ("acme", 1000, "b"), ("", 396, "a"), ("", 400, "c"), ("x", 4000, "c")]
    for tenant, size, name in expected:
        body = {"model": "chat", "messages": [{"role": "user", "content": "x" * size}]}
        assert (await world.ask(body, tenant=tenant)).headers["x-ropeway-deployment"] == name


async def test_conversations_stay_where_their_beginning_is_cached() -> None:
    route = Route(name="chat", targets=dict.fromkeys("abcd", 1.0), balance="affinity")
    world = World({"chat": route}, {name: Plain(name) for name in "abcd"})
    homes = set()
    for user in range(20):
        turns, found = [{"role": "user", "content": f"I am {user}"}], set()
        for _ in range(4):
            found.add((await world.ask({"model": "chat", "messages": turns})).headers["x-ropeway-deployment"])
            turns = [*turns, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on"}]
        assert len(found) == 1
        homes |= found
    assert homes == set("abcd")


class Halves:
    """Splits keys by a function, and writes down what it is told."""

    def __init__(self, choose: Callable[[str], str]) -> None:
        self.choose = choose
        self.told: list[tuple[str, int]] = []

    def observe(self, deployment: str, outcome: Outcome, key: str) -> None:
        self.told.append((deployment, outcome.status))


async def test_a_splitter_goes_before_the_weights_and_hears_of_every_attempt() -> None:
    splitter = Halves(lambda key: "canary" if int(key, 16) % 2 else "a")
    rule = Rule(tenants=frozenset({"acme"}), targets={"b": 1})
    route = Route(name="chat", targets={"a": 1}, rules=[rule])
    backends = {"a": Plain("a"), "b": Plain("b"), "canary": Plain("canary", 500, 200)}
    world = World({"chat": route}, backends, splitter)
    keys = [{"model": "chat", "user": str(number)} for number in range(12)]
    for body in keys:
        assert (await world.ask(body)).status == 200
    assert splitter.told.count(("canary", 500)) == 1
    assert splitter.told.count(("canary", 200)) == len(backends["canary"].asked) - 1 > 0
    assert splitter.told.count(("a", 200)) == len(backends["a"].asked)
    assert len(splitter.told) == 13
    told = len(splitter.told)
    assert (await world.ask(keys[0], tenant="acme")).headers["x-ropeway-deployment"] == "b"
    assert len(splitter.told) == told  # chance did not send it there


async def test_a_canary_that_fails_loses_its_traffic(tmp_path: Path) -> None:
    """Its circuit alone would let it have some again and again."""
    canary = Plain("canary", 200, *[500, 500, 200] * 2000)
    canaries = Canaries(tmp_path / "canary.db", {"chat": ["a"]}, ["a", "canary"])
    world = World({"chat": {"a": 1}}, {"a": Plain("a"), "canary": canary}, canaries.splitter)
    await canaries.start("chat", CanaryStart(canary="canary", weight=0.5))
    for number in range(2000):
        world.now += 0.01
        await world.ask({"model": "chat", "user": str(number)})
        [state] = canaries.states()
        if state.state != "running":
            break
    assert state.state == "stopped"
    asked = len(canary.asked)
    for number in range(200):
        assert (await world.ask({"model": "chat", "user": str(number)})).status == 200
    assert len(canary.asked) == asked
    await canaries.close()


async def test_times_are_those_of_the_texts() -> None:
    splitter = Halves(lambda key: "a")
    outcomes: list[Outcome] = []
    splitter.observe = lambda deployment, outcome, key: outcomes.append(outcome)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        opening = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        text = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
        usage = b'data: {"usage":{"prompt_tokens":5,"completion_tokens":9}}\n\ndata: [DONE]\n\n'
        for wait, body in ((1, opening), (2, b": keep-alive\n\n"), (3, text), (4, text), (6, text), (7, usage)):
            world.now += wait
            await send({"type": "http.response.body", "body": body, "more_body": body is not usage})

    world = World({"chat": {"a": 1}}, {"a": Plain("a", slow)}, splitter)
    await world.ask({"model": "chat"})
    [outcome] = outcomes
    assert (outcome.ttft_s, outcome.itl_s, outcome.latency_s, outcome.tokens) == (6.0, 5.0, 23.0, 9)
    assert outcome.streamed
    assert outcome.began
    assert not outcome.broken


class Account:
    """A meter that writes down what it is charged."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, model: str) -> None:
        self.calls.append(("begin", self.model))

    def reserve(self, prompt: int, answer: int | None) -> None:
        self.calls.append(("reserve", prompt, answer))

    def end(self, prompt: int, cached: int, answer: int) -> None:
        self.calls.append(("end", prompt, cached, answer))


async def test_other_servers_answers_are_charged_by_their_own_account() -> None:
    usage = b'{"usage":{"prompt_tokens":5,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":2}}}'

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": usage})

    silent = stream(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
    backends = {"a": Plain("a", 500), "b": Plain("b", answer, silent)}
    world = World({"chat": Route(name="chat", targets={"a": 1}, fallbacks=["b"])}, backends)
    body, reserve = {"model": "chat", "prompt": "x" * 40, "max_tokens": 20}, ("reserve", 10, 20)
    account = Account()
    await world.ask(body, meter=account)
    begin = ("begin", "chat")
    assert account.calls == [begin, reserve, ("end", 0, 0, 0), begin, reserve, ("end", 5, 2, 9)]
    account = Account()
    await world.ask(body, meter=account)  # a server that does not say what it has used
    assert account.calls[-1] == ("end", 10, 0, 1)


async def test_a_client_that_leaves_is_nobodys_failure() -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        """As applications do whose client has left: they return without an end."""

    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", gone), "b": Plain("b")})
    assert (await world.ask({"model": "chat"})).status == 0
    assert world.blame() == {"a": {"client_gone": 1}}


async def test_a_cancelled_request_gives_everything_back() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.get_running_loop().create_future()

    world = World({"chat": {"a": 1}}, {"a": Plain("a", never)})
    task = asyncio.create_task(world.ask({"model": "chat"}))
    await asyncio.sleep(0.01)
    assert world.deployments["a"].load == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.blame() == {"a": {"client_gone": 1}}


def test_the_front_is_ready_when_somebody_takes_requests() -> None:
    from ropeway.gateway.front import FrontService

    world = World({"chat": {"a": 1}}, {"a": Plain("a")})
    front = FrontService("chat", world.deployments)
    assert front.state is LinkState.STARTING
    front.opened = True
    assert front.state is LinkState.READY
    world.deployments["a"].held = True
    assert front.state is LinkState.STARTING
    front.drain()
    assert front.state is LinkState.DRAINING
