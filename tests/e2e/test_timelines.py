"""The engine at work as those who watch see it, and the lives of requests, over HTTP, in files and in traces."""

from __future__ import annotations

import base64
import concurrent.futures
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import ADMIN
from running import Server as Process

from apiserver import INFO, TEXT, Server, over
from ropeway.cli.main import main
from ropeway.config import EngineConfig
from ropeway.contract import StepResult
from ropeway.engine.engine import Engine
from ropeway.sim import FakeExecutor
from waiting import until

OWNER, CLIENT, OTHER = ({"authorization": f"Bearer {key}"} for key in ("owner", "client", "other"))
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Slow(FakeExecutor):
    """Each step takes a moment."""

    def collect(self, ticket: int) -> StepResult:
        time.sleep(0.002)
        return super().collect(ticket)


class Collector:
    """An OTLP collector in this process. `spans` are those that have come."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/traces"
                collector.headers.append(dict(self.headers))
                for resource in body["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        collector.spans += scope["spans"]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def watched(**settings: Any) -> Iterator[Server]:
    """A server over a slow engine of two seats on a thread."""
    engine = Engine(Slow(INFO), EngineConfig(max_num_seqs=2, max_num_batched_tokens=64))
    with over(engine, TEXT, api_key="client,other", admin_key="owner", **settings) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with watched() as up:
        yield up


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        yield threads


def ask(server: Server, name: str, headers: dict[str, str] = CLIENT, tokens: int = 100, **body: Any) -> httpx2.Response:
    asked = {"prompt": f"{name} " * 20, "max_tokens": tokens, "ignore_eos": True, **body}
    return server.http.post("/v1/completions", json=asked, headers={**headers, "x-request-id": name})


def frames(server: Server, headers: dict[str, str], over: Callable[[list[Any]], bool]) -> tuple[Any, list[Any]]:
    """The hello and the frames until there are enough."""
    found: list[Any] = []
    hello: Any = None
    with httpx2.Client(base_url=server.url, timeout=60, headers=headers) as http:
        with http.stream("GET", "/ui/feed?every=0.1") as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    if kind == "hello":
                        hello = json.loads(line[6:])
                    else:
                        found.append(json.loads(line[6:]))
                    kind = ""
                    if found and over(found):
                        return hello, found
    raise AssertionError("the feed has ended")


def test_the_batch_is_seen_at_work(server: Server, pool: concurrent.futures.ThreadPoolExecutor) -> None:
    names = [f"seen-{number}" for number in range(5)]
    watching = pool.submit(
        frames,
        server,
        OWNER,
        lambda found: sum(event["event"] == "finished" for frame in found for event in frame["events"]) >= 5,
    )
    until(lambda: server.call(lambda: server.app.state.hub.number))
    answers = [pool.submit(ask, server, name, tokens=300) for name in names]
    hello, found = watching.result(30)
    assert [answer.result().status_code for answer in answers] == [200] * 5
    (engine,) = hello["engines"]
    assert (engine["model"], engine["slots"], engine["block_size"], hello["operator"]) == ("fake", 2, 16, True)
    busy = [frame for frame in found if frame["seats"]]
    assert {seat["id"] for frame in busy for seat in frame["seats"]} <= set(names)
    assert max(len(frame["seats"]) for frame in busy) == 2
    waiting = [one for frame in busy for one in frame["waiting"]]
    assert waiting
    assert {one["holder"] for one in waiting} <= {"seats", "priority", ""}
    assert all(one["reason"] for one in waiting)
    assert max(frame["waiting_total"] for frame in busy) == 3
    for frame in busy:
        cells = base64.b64decode(frame["kv"]["cells"])
        assert len(cells) == frame["kv"]["total"] == 64
        assert set(cells) <= set(range(5))
        assert (frame["model"], frame["state"]) == ("fake", "ready")
    assert any(frame["rates"]["generation_tps"] and frame["rates"]["itl_p50"] for frame in busy)
    for name in names:
        life = [event["event"] for frame in found for event in frame["events"] if event["id"] == name]
        assert life == ["queued", "boarded", "finished"]
    moments = [event["t"] for frame in found for event in frame["events"]]
    assert moments == sorted(moments)
    assert abs(moments[-1] - time.time()) < 60


def test_each_sees_the_names_of_its_own_requests_alone(
    server: Server, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    def two(found: list[Any]) -> bool:
        return len(found[-1]["seats"]) == 2

    asked = [pool.submit(ask, server, "of-client", CLIENT, 300), pool.submit(ask, server, "of-other", OTHER, 300)]
    (_, by_client), (_, by_other), (_, by_owner) = [
        one.result(60) for one in [pool.submit(frames, server, who, two) for who in (CLIENT, OTHER, OWNER)]
    ]
    for found, visible in ((by_client, "of-client"), (by_other, "of-other")):
        ids = [seat["id"] for seat in found[-1]["seats"]]
        assert visible in ids
        assert len([id for id in ids if id.startswith("~")]) == 1
    assert {seat["id"] for seat in by_owner[-1]["seats"]} == {"of-client", "of-other"}
    assert [one.result().status_code for one in asked] == [200, 200]


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("", {}, 401),
        ("", {"authorization": "Bearer wrong"}, 401),
        ("?every=often", CLIENT, 400),
        ("?every=nan", CLIENT, 400),
        ("?frames=0", CLIENT, 400),
        ("?frames=-1", CLIENT, 400),
        ("?frames=99999999999999", CLIENT, 400),
        ("?every=-5&frames=1", CLIENT, 200),
        ("?every=inf&frames=1", CLIENT, 200),
        ("?frames=1&every=0.1", CLIENT, 200),
    ],
)
def test_what_the_feed_takes(server: Server, query: str, headers: dict[str, str], status: int) -> None:
    answer = server.http.get(f"/ui/feed{query}", headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["message"]


def test_a_request_tells_its_life_while_it_lasts_and_afterwards(
    server: Server, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    asked = [pool.submit(ask, server, f"told-{number}", tokens=200) for number in range(4)]
    found = until(lambda: _of(server, "told-3"), lambda lives: any(life["spans"][0]["waits"] for life in lives))
    assert found[0]["finish"] is None
    assert found[0]["spans"][-1]["end"] is None
    assert found[0]["spans"][0]["waits"][0]["reason"]
    assert [one.result().status_code for one in asked] == [200] * 4
    for number in range(4):
        [life] = _of(server, f"told-{number}")
        assert (life["finish"], life["completion_tokens"], life["urgency"]) == ("length", 200, "high")
        assert [span["phase"] for span in life["spans"]] == ["queue", "prefill", "decode"]
        read = life["spans"][1]
        assert sum(chunk["count"] for chunk in read["chunks"]) + read["cached"] == life["prompt_tokens"]
        assert read["last_step"] - read["first_step"] >= 1  # 64 tokens a step, and twice as many to read
        told = server.http.get(f"/v1/requests/told-{number}", headers=CLIENT).json()
        spent = life["seconds"]
        assert spent["queue"] == pytest.approx(told["queue_seconds"], abs=0.05)
        assert sum(spent.values()) == pytest.approx(told["seconds"], abs=2.0)  # the API has seen more of it
    listed = server.http.get("/v1/requests?timeline=true&limit=3", headers=CLIENT).json()["data"]
    assert [len(one["timeline"]) for one in listed] == [1, 1, 1]
    assert server.http.get("/v1/requests?limit=1", headers=CLIENT).json()["data"][0]["timeline"] is None
    assert server.http.get("/v1/requests?timeline=perhaps", headers=CLIENT).status_code == 400
    ask(server, "two", n=2, tokens=3)
    assert len(_of(server, "two")) == 2


def _of(server: Server, name: str) -> list[Any]:
    answer = server.http.get(f"/v1/requests/{name}", headers=CLIENT)
    return list(answer.json()["timeline"]) if answer.status_code == 200 else []


def test_a_collector_gets_a_span_for_each_request_and_for_each_part_of_its_life() -> None:
    collector = Collector()
    try:
        with watched(otlp_endpoint=collector.url, otlp_headers="x-team=ropeway") as server:
            mine = {**CLIENT, "traceparent": f"00-{TRACE}-{SPAN}-01"}
            unwanted = {**CLIENT, "traceparent": f"00-{TRACE}-{SPAN}-00"}
            answer = ask(server, "traced", mine, 20, temperature=0.5, seed=7)
            assert ask(server, "alone", tokens=3).status_code == 200
            known = ask(server, "known", tokens=3, prompt="traced " * 20).json()["usage"]["prompt_tokens_details"]
            assert ask(server, "unwanted", unwanted, 3).status_code == 200
            refused = server.http.post("/v1/completions", json={"prompt": "x" * 600}, headers=CLIENT)
            assert refused.status_code == 400
            until(lambda: len(collector.spans) >= 12)
    finally:
        collector.close()
    spans = collector.spans
    roots = {values(span)["ropeway.request.id"]: span for span in spans if span["kind"] == 2}
    assert {"traced", "alone", "known"} <= roots.keys()
    assert "unwanted" not in roots
    root = roots["traced"]
    assert (root["traceId"], root["parentSpanId"], root["name"]) == (TRACE, SPAN, "text_completion fake")
    told = values(root)
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == "fake"
    assert told["gen_ai.response.id"] == answer.json()["id"]
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.usage.output_tokens"] == "20"
    assert told["gen_ai.usage.input_tokens"] == str(answer.json()["usage"]["prompt_tokens"])
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.seed"]) == (0.5, "7")
    below = [span for span in spans if span.get("parentSpanId") == root["spanId"]]
    assert [span["name"] for span in below] == ["queue", "prefill", "decode"]
    assert {span["traceId"] for span in below} == {TRACE}
    edges = [int(root["startTimeUnixNano"]), *(int(span["startTimeUnixNano"]) for span in below)]
    assert edges == sorted(edges)
    assert int(below[-1]["endTimeUnixNano"]) <= int(root["endTimeUnixNano"]) + 50_000_000
    assert below[1]["events"][0]["name"] == "chunk"
    assert "ropeway.cached_tokens" not in values(below[1])
    [read] = [
        span for span in spans if (span.get("parentSpanId"), span["name"]) == (roots["known"]["spanId"], "prefill")
    ]
    assert int(values(read)["ropeway.cached_tokens"]) == known["cached_tokens"] >= 16
    other = roots["alone"]
    assert "parentSpanId" not in other
    assert other["traceId"] != TRACE
    assert all(header["x-team"] == "ropeway" for header in collector.headers)
    assert "traced traced" not in json.dumps(spans)  # nothing of the prompt


def values(span: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in span["attributes"]:
        [(kind, value)] = one["value"].items()
        found[one["key"]] = [part["stringValue"] for part in value["values"]] if kind == "arrayValue" else value
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert not done.value.code
    return capsys.readouterr().out


def test_a_real_server_is_seen_from_the_terminal(
    bundled: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"prompt": "A cable car", "max_tokens": 12, "ignore_eos": True}
    answer = httpx2.post(
        f"{bundled.url}/v1/completions", json=body, headers={"x-request-id": "told-by-trace"}, timeout=60
    )
    assert answer.status_code == 200
    shown = run(capsys, "top", "--once", "--url", bundled.url, "--api-key", ADMIN)
    assert "bundled" in shown
    assert "ready" in shown
    assert "waiting" in shown
    [line] = run(capsys, "top", "--once", "--json", "--url", bundled.url, "--api-key", ADMIN).splitlines()
    assert json.loads(line)["kv"]["total"] == 512
    output = tmp_path / "trace.json"
    told = run(capsys, "trace", "--url", bundled.url, "--api-key", ADMIN, "-o", str(output))
    assert str(output) in told
    names = [event["name"] for event in json.loads(output.read_text())["traceEvents"]]
    assert {"told-by-trace", "told-by-trace: prefill", "told-by-trace: decode"} <= set(names)
