"""Canaries as an operator meets them: over HTTP and from the command line, on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks
from typer.testing import CliRunner

import apiserver
from ropeway.api.app import create_app, describe
from ropeway.cli.main import app
from ropeway.config import ServerConfig
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.outcome import Outcome
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

ADMIN = {"authorization": "Bearer the-admins"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[apiserver.Server]:
    with apiserver.running(EchoService(), admin_key="the-admins") as up:
        seconds = itertools.count()
        canaries = Canaries(
            tmp_path / "canary.db",
            {"org/chat": ["old"], "other": ["old"]},
            {"old", "new", "newer"},
            clock=lambda: float(next(seconds)),
        )
        up.app.state.canaries = canaries
        yield up
        asyncio.run_coroutine_threadsafe(canaries.close(), up._loop).result(60)


def ropeway(server: apiserver.Server, *words: str, code: int = 0) -> str:
    ran = CliRunner().invoke(app, ["canary", *words, "--url", server.url, "--api-key", "the-admins"])
    assert ran.exit_code == code, ran.output
    return ran.output or str(ran.exception)


def observe(server: apiserver.Server, route: str, *, number: int, slower: float) -> None:
    """Answers of both sides, the canary's so many times as slow. Whoever gets which, each side's own times are the same
    over and over: their averages do not hang on the draw."""
    splitter = server.app.state.canaries.splitter(route)
    times = {side: itertools.cycle(range(1, 11)) for side in ("old", "new")}

    def work() -> None:
        for index in range(number):
            where = splitter.choose(str(index))
            seconds = next(times[where]) / 100 * (slower if where == "new" else 1.0)
            outcome = Outcome(status=200, latency_s=seconds, ttft_s=seconds / 4, itl_s=seconds / 50, streamed=True)
            splitter.observe(where, outcome, str(index))

    server.call(work)


def test_a_canary_from_start_to_promotion_on_the_command_line(server: apiserver.Server) -> None:
    assert "No canary" in ropeway(server, "status")
    told = ropeway(server, "start", "org/chat", "new", "--weight", "10%")
    assert "org/chat: running, 10 % to new, the rest to old" in told
    assert "25 % to new" in ropeway(server, "weight", "org/chat", "0.25")
    observe(server, "org/chat", number=1200, slower=0.8)
    told = ropeway(server, "status", "org/chat")
    words = "control_samples canary_samples control_avg canary_avg improvement latency ttft itl errors"
    assert all(word in told for word in words.split()), told
    [state] = json.loads(ropeway(server, "status", "--json"))
    latency = state["analysis"]["latency"]
    assert latency["improvement_percent"] == pytest.approx(20, abs=3)
    assert latency["low_percent"] < latency["typical_percent"] < latency["high_percent"]
    assert latency["control_samples"] + latency["canary_samples"] == 1200
    assert "promoted" in ropeway(server, "promote", "org/chat")
    assert server.app.state.canaries.splitter("org/chat").choose("anybody") == "new"
    assert "rolled_back" in ropeway(server, "rollback", "org/chat")
    assert server.app.state.canaries.splitter("org/chat").choose("anybody") == "old"
    ropeway(server, "forget", "org/chat")
    assert "No canary" in ropeway(server, "status")


def test_a_regression_is_stopped_and_said(server: apiserver.Server) -> None:
    ropeway(server, "start", "other", "new", "--weight", "50%", "--max-regression", "5%")
    observe(server, "other", number=4000, slower=1.3)
    told = ropeway(server, "status", "other")
    assert "other: stopped" in told
    assert "longer (interval" in told
    assert server.app.state.canaries.splitter("other").choose("anybody") == "old"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "nowhere", {"canary": "new"}, 404, "route_not_found"),
        ("PUT", "org/chat", {"canary": "gone"}, 400, "deployment_not_found"),
        ("PUT", "org/chat", {}, 400, None),
        ("PUT", "org/chat", {"canary": "new", "weight": 1.5}, 400, None),
        ("PUT", "org/chat", {"canary": "new", "alpha": 0}, 400, None),
        ("PATCH", "org/chat", {"weight": 0.5}, 404, "no_canary"),
        ("PATCH", "org/chat", {}, 400, None),
        ("PATCH", "org/chat", {"weight": 0.5, "state": "promoted"}, 400, None),
        ("PATCH", "org/chat", {"state": "stopped"}, 400, None),
        ("DELETE", "org/chat", None, 404, "no_canary"),
        ("DELETE", "%00%ff", None, 404, "no_canary"),
    ],
)
def test_what_makes_no_sense_is_refused(
    server: apiserver.Server, method: str, path: str, body: dict[str, Any] | None, status: int, code: str | None
) -> None:
    answer = server.http.request(method, f"/admin/canary/{path}", headers=ADMIN, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert server.app.state.canaries.states() == []


def test_only_the_operator_and_only_a_server_with_routes(server: apiserver.Server) -> None:
    assert server.http.get("/admin/canary").status_code == 401
    assert server.http.get("/admin/canary", headers=ADMIN).json() == {"data": []}
    del server.app.state.canaries
    answer = server.http.get("/admin/canary", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_routes")
    wrong = CliRunner().invoke(app, ["canary", "start", "a", "b", "--weight", "many", "--url", server.url])
    assert wrong.exit_code == 2
    assert "neither a share" in wrong.output


class Everything(dict[str, list[str]]):
    """A table in which every route and every deployment exists."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> list[str]:
        return ["old"]


@pytest.fixture(scope="module")
def willing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apiserver.Server]:
    with apiserver.running(EchoService(), admin_key="the-admins") as up:
        up.app.state.canaries = canaries = Canaries(
            tmp_path_factory.mktemp("willing") / "canary.db", Everything(), Everything()
        )
        yield up
        asyncio.run_coroutine_threadsafe(canaries.close(), up._loop).result(60)


described = schemathesis.openapi.from_dict(describe(create_app(EchoService(), ServerConfig(), Metrics("echo"))))


@described.include(path_regex="^/admin/canary").parametrize()
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_there_is_an_answer_as_described(case: schemathesis.Case, willing: apiserver.Server) -> None:
    case.headers = {**(case.headers or {}), **ADMIN}
    holds = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]
    case.call_and_validate(base_url=willing.url, checks=holds, timeout=30)
