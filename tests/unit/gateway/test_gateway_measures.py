"""What the router measures, charges and tells a splitter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from routerkit import Plain, World, stream
from starlette.types import Receive, Scope, Send

from ropeway.api.canary_schema import CanaryStart
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.outcome import Outcome
from ropeway.gateway.table import Route, Rule


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
