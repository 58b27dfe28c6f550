"""Requests by name: who sees which, what they are told, and how one is ended by hand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from apiserver import Server, running
from ropeway.api.registry import Registry
from ropeway.cli.main import main
from ropeway.contract import FinishReason, SamplingParams, Why
from ropeway.errors import EngineError, OverloadedError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest
from waiting import until

FIRST, SECOND, OWNER = ({"authorization": f"Bearer {key}"} for key in ("first", "second", "owner"))


class Line(EchoService):
    """Says of everybody whose prompt begins with W that it waits, in order of arrival."""

    def __init__(self) -> None:
        super().__init__(delay=0.001)
        self.waiting: list[int] = []
        self.refuse = False
        self.fails = False

    async def submit(self, request: TextRequest) -> Any:
        if self.refuse:
            raise OverloadedError("The queue is full.", retry_after=1.0)
        stream = await super().submit(request)
        if bytes(stream.prompt_tokens[:1]) == b"W":
            self.waiting.append(stream.rid)
        return stream

    async def why(self, *rids: int) -> list[Why]:
        if self.fails:
            raise EngineError("The engine does not answer.")
        return [
            Why(rid, "queued", place, "slots", "all seats are taken", 1.5 + place)
            for place, rid in enumerate(self.waiting)
            if not rids or rid in rids
        ]


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def server(line: Line) -> Iterator[Server]:
    with running(line, api_key="first,second", admin_key="owner") as up:
        yield up


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        yield threads


def seen(server: Server, headers: dict[str, str] = FIRST, **query: Any) -> list[dict[str, Any]]:
    answer = server.http.get("/v1/requests", headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def test_a_finished_request_is_found_by_either_name_with_what_it_has_cost(server: Server) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "abcd", "n": 2}, headers=FIRST)
    by_header = server.http.get(f"/v1/requests/{answer.headers['x-request-id']}", headers=FIRST).json()
    by_answer = server.http.get(f"/v1/requests/{answer.json()['id']}", headers=FIRST).json()
    assert by_header == by_answer
    assert (by_header["id"], by_header["answer_id"]) == (answer.headers["x-request-id"], answer.json()["id"])
    assert (by_header["state"], by_header["sequences"], by_header["error"]) == ("finished", 2, None)
    told = answer.json()["usage"]
    assert all(
        by_header["usage"][name] == told[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    assert 0 < by_header["ttft_seconds"] <= by_header["seconds"]
    assert (by_header["preemptions"], by_header["queue_seconds"]) == (0, 0.0)


def test_each_sees_its_own_and_the_owner_all(server: Server) -> None:
    names = {}
    for name, headers in (("first", FIRST), ("second", SECOND)):
        names[name] = server.http.post(
            "/v1/completions", json={"prompt": name}, headers={**headers, "x-request-id": f"of-{name}"}
        ).json()["id"]
    assert [one["id"] for one in seen(server, FIRST)] == ["of-first"]
    assert [one["id"] for one in seen(server, SECOND)] == ["of-second"]
    assert [one["id"] for one in seen(server, OWNER)] == ["of-second", "of-first"]
    for method, name in [("GET", "of-first"), ("DELETE", "of-first"), ("GET", names["first"]), ("GET", "nothing")]:
        refusal = server.http.request(method, f"/v1/requests/{name}", headers=SECOND)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (404, "request_not_found")
    assert server.http.get("/v1/requests/of-first", headers=OWNER).json()["answer_id"] == names["first"]
    assert server.http.get("/v1/models", headers=OWNER).status_code == 401


def test_an_id_that_was_used_twice_means_the_newest(server: Server) -> None:
    for prompt in ("a", "ab"):
        server.http.post("/v1/completions", json={"prompt": prompt}, headers={**FIRST, "x-request-id": "same"})
    assert server.http.get("/v1/requests/same", headers=FIRST).json()["usage"]["prompt_tokens"] == 2


def test_a_waiting_request_says_why_and_where_and_for_how_long(
    server: Server, line: Line, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    line.delay = 30.0
    for name in ("one", "two"):
        headers = {**FIRST, "x-request-id": name}
        pool.submit(server.http.post, "/v1/completions", json={"prompt": "Wait"}, headers=headers)
        until(lambda name=name: [one for one in seen(server) if one["id"] == name and one["reason"]])
    pool.submit(server.http.post, "/v1/completions", json={"prompt": "Go"}, headers={**FIRST, "x-request-id": "runs"})
    until(lambda: len(seen(server, state="running")) == 1)
    two = server.http.get("/v1/requests/two", headers=FIRST).json()
    assert (two["state"], two["position"], two["held_by"]) == ("queued", 2, "slots")
    assert (two["reason"], two["eta_seconds"]) == ("all seats are taken", 2.5)
    assert two["queue_seconds"] == two["seconds"] > 0
    assert two["usage"]["completion_tokens"] == 0
    assert {one["id"]: one["state"] for one in seen(server)} == {"one": "queued", "two": "queued", "runs": "running"}
    for name in ("one", "two", "runs"):
        ended = server.http.delete(f"/v1/requests/{name}", headers=FIRST).json()
        assert (ended["state"], ended["error"]["code"]) == ("cancelled", "request_cancelled")
    assert line.stats is not None
    assert line.stats.running == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_cancelled_stream_ends_with_one_error_event(server: Server, line: Line, n: int) -> None:
    line.delay = 0.002
    body = {"prompt": "x" * 2000, "max_tokens": 2000, "stream": True, "n": n}
    with httpx2.Client(base_url=server.url, headers=FIRST) as http:
        with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "long"}) as response:
            lines = response.iter_lines()
            first = json.loads(next(lines)[6:])
            under_way = server.http.get(f"/v1/requests/{first['id']}", headers=FIRST).json()
            assert (under_way["state"], under_way["id"]) == ("running", "long")
            assert server.http.delete("/v1/requests/long", headers=FIRST).json()["state"] == "cancelled"
            events = [text.removeprefix("data: ") for text in lines if text]
    assert events.pop() == "[DONE]"
    errors = [json.loads(event)["error"] for event in events if "error" in json.loads(event)]
    assert [(error["type"], error["code"]) for error in errors] == [("cancelled", "request_cancelled")]
    assert "error" in json.loads(events[-1])
    state = server.http.get("/v1/requests/long", headers=FIRST).json()
    assert 0 < state["usage"]["completion_tokens"] < 2000 * n
    again = server.http.delete("/v1/requests/long", headers=FIRST)
    assert (again.status_code, again.json()) == (200, state)


def test_a_cancelled_whole_answer_is_no_success_and_not_sent_again(
    server: Server, line: Line, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    line.delay = 30.0
    client = server.client(api_key="first", max_retries=2, default_headers={"x-request-id": "whole"})
    waiting = pool.submit(client.completions.create, model="echo", prompt="a", n=2)
    until(lambda: [one for one in seen(server, state="running") if one["sequences"] == 2])
    server.http.delete("/v1/requests/whole", headers=FIRST)
    error = waiting.exception(60)
    assert isinstance(error, openai.APIStatusError)
    assert (error.status_code, error.code) == (499, "request_cancelled")
    assert len(seen(server)) == 1


def test_the_command_line_lists_shows_and_cancels(
    server: Server, line: Line, pool: concurrent.futures.ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    def ropeway(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["requests", *words, "--url", server.url, "--api-key", "first"])
        out, err = capsys.readouterr()
        return out if not end.value.code else f"{end.value.code} {err}"

    line.delay = 30.0
    pool.submit(server.http.post, "/v1/completions", json={"prompt": "Wait"}, headers={**FIRST, "x-request-id": "w"})
    until(lambda: seen(server, state="queued"))
    assert re.search(r"^w +queued +[0-9.]+ +4 +0 +0  all seats are taken$", ropeway("list"), re.MULTILINE)
    assert "w " not in ropeway("list", "--state", "running")
    shown = ropeway("show", "w")
    assert re.search(r"^held_by +slots$", shown, re.MULTILINE)
    assert re.search(r"^prompt_tokens +4$", shown, re.MULTILINE)
    assert json.loads(ropeway("show", "w", "--json"))["position"] == 1
    assert re.search(r"^state +cancelled$", ropeway("cancel", "w"), re.MULTILINE)
    assert ropeway("show", "nobody").startswith("1 RW-REQ: HTTP 404: There is no request nobody")


def test_what_was_refused_or_left_is_told_so(server: Server, line: Line) -> None:
    line.refuse = True
    server.http.post("/v1/completions", json={"prompt": "a"}, headers={**FIRST, "x-request-id": "full"})
    line.refuse, line.delay = False, 30.0
    with server.connect() as raw:
        body = b'{"prompt":"a"}'
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer first\r\nx-request-id: left\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: seen(server, state="running"))
    until(lambda: seen(server, state="cancelled"))
    found = {one["id"]: one for one in seen(server)}
    assert (found["full"]["state"], found["full"]["error"]["code"]) == ("failed", "server_overloaded")
    assert (found["left"]["state"], "left" in found["left"]["error"]["message"]) == ("cancelled", True)


def test_an_engine_that_says_nothing_leaves_its_requests_running(
    server: Server, line: Line, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    line.delay = 30.0
    pool.submit(server.http.post, "/v1/completions", json={"prompt": "Wait"}, headers={**FIRST, "x-request-id": "w"})
    until(lambda: seen(server, state="queued"))
    line.fails = True
    [told] = seen(server, timeline="true")
    assert (told["state"], told["position"], told["reason"], told["timeline"]) == ("running", None, None, [])
    assert server.http.get("/v1/requests/w", headers=FIRST).json()["timeline"] == []
    assert server.http.delete("/v1/requests/w", headers=FIRST).json()["state"] == "cancelled"


def test_lists_are_bounded_and_questions_checked(server: Server) -> None:
    for number in range(3):
        server.http.post("/v1/completions", json={"prompt": str(number)}, headers=FIRST)
    page = server.http.get("/v1/requests?limit=2&state=finished", headers=FIRST).json()
    assert (page["object"], len(page["data"]), page["has_more"]) == ("list", 2, True)
    for query, param in [("state=lost", "state"), ("limit=0", "limit"), ("limit=1e3", "limit"), ("limit=٣", "limit")]:
        refusal = server.http.get(f"/v1/requests?{query}", headers=FIRST)
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, param)


async def test_a_request_is_cancelled_before_the_engine_has_heard_of_it() -> None:
    """Its prompt is being read, which may take a while."""
    service, read = EchoService(delay=30.0), asyncio.Event()

    async def door(request: TextRequest) -> Any:
        await read.wait()
        return await service.submit(request)

    request = TextRequest(request_id="r", text="abc", sampling=SamplingParams())
    tracked = Registry(service).track("r")
    with tracked:
        submitting = asyncio.create_task(tracked.submit(request, door=door))
        told = tracked.state([])
        assert (told.state, told.position, told.reason) == ("queued", 1, "its prompt is being read")
        tracked.cancel()
        assert tracked.state([]).state == "cancelled"
        read.set()
        stream = await submitting
        assert [chunk.finish for chunk in [chunk async for chunk in stream]] == [FinishReason.CANCELLED]


async def test_what_has_ended_is_forgotten_by_number_and_by_time() -> None:
    now = [0.0]
    registry = Registry(EchoService(), keep=2, seconds=10.0, clock=lambda: now[0])
    live = registry.track("live")
    for number in range(3):
        registry.track(str(number)).end()
        now[0] += 4.0
    assert [tracked.id for tracked in registry.newest(None)] == ["live", "2", "1"]
    now[0] = 15.0
    assert [tracked.id for tracked in registry.newest("")] == ["live", "2"]
    now[0] = 100.0
    assert registry.find("live", None) is live
    assert registry.find("2", None) is None
