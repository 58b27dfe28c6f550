"""Routes, retries and blame, with deployments that are plain applications."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
from routerkit import Plain, World, stream
from starlette.types import Receive, Scope, Send

from ropeway.contract import SamplingParams
from ropeway.contract.channel import LinkState
from ropeway.errors import (
    DrainingError,
    NotReadyError,
    OverloadedError,
    RequestError,
    RopewayError,
    UnknownModelError,
)
from ropeway.gateway.proxy import UpstreamError
from ropeway.gateway.table import Route, Rule
from ropeway.service.request import TextRequest


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
    """Both deployments refuse every request, which opens no circuit."""
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


async def test_a_client_that_leaves_is_nobodys_failure() -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        """As applications do whose client has left: they return without an end."""

    world = World({"chat": {"a": 2, "b": 1}}, {"a": Plain("a", gone), "b": Plain("b")})
    assert (await world.ask({"model": "chat"})).status == 0
    assert world.blame() == {"a": {"client_gone": 1}}


async def test_a_cancelled_request_gives_everything_back() -> None:
    asked = asyncio.Event()

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        asked.set()
        await asyncio.get_running_loop().create_future()

    world = World({"chat": {"a": 1}}, {"a": Plain("a", never)})
    task = asyncio.create_task(world.ask({"model": "chat"}))
    await asyncio.wait_for(asked.wait(), 10)
    assert world.deployments["a"].load == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.blame() == {"a": {"client_gone": 1}}


def loading(*names: str) -> World:
    """Deployments that are being loaded."""
    world = World({"chat": dict.fromkeys(names, 1.0)}, {name: Plain(name) for name in names})
    for one in world.backends.values():
        one.phase = "starting"
        one.loaded.clear()
    return world


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_client_may_leave_while_its_model_is_loaded() -> None:
    world, leaves = loading("a"), asyncio.Event()
    task = asyncio.create_task(world.ask({"model": "chat"}, leaves=leaves))
    await settle()
    assert world.deployments["a"].load == 1
    leaves.set()
    assert (await task).status == 0
    assert world.blame() == {}
    world.backends["a"].loaded.set()
    assert (await world.ask({"model": "chat"})).status == 200
    assert len(world.backends["a"].asked) == 1


@pytest.mark.parametrize("loaded", [False, True])
async def test_a_request_that_is_cancelled_while_its_model_is_loaded_keeps_nothing(loaded: bool) -> None:
    world = loading("a")
    task = asyncio.create_task(world.ask({"model": "chat"}))
    await settle()
    if loaded:  # in the very moment
        world.backends["a"].loaded.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.blame() == {}
    assert not world.backends["a"].asked


async def test_an_answer_in_one_piece_that_breaks_off_is_cut_off() -> None:
    """There is no other way to tell its client."""

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"choices":', "more_body": True})
        raise UpstreamError(502, "broke off", "upstream_failed", began=True)

    world, cut = World({"chat": {"a": 1}}, {"a": Plain("a", half)}), asyncio.Event()
    answer = await world.ask({"model": "chat"}, abort=cut.set)
    assert (answer.body, answer.complete, cut.is_set()) == (b'{"choices":', False, True)
    assert world.blame() == {"a": {"failure": 1}}


async def test_the_front_answers_for_no_model() -> None:
    """Whatever of the application needs one is told to name it, and not given another's answer."""
    from ropeway.gateway.front import FrontService

    world = World({"chat": {"a": 1}}, {"a": Plain("a")})
    front = FrontService("chat", world.deployments)
    request = TextRequest(request_id="r", text="x", sampling=SamplingParams())
    for asked in (front.submit(request), front.tokenize(request), front.detokenize([1]), front.pin(), front.reorder()):
        with pytest.raises(RequestError, match="name one of them") as refused:
            await asked
        assert refused.value.param == "model"
    assert (await front.why(1), await front.recall(1), await front.look()) == ([], [], None)
    assert front.stats is None


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
