"""Responses in the background over real HTTP: found again, followed, cancelled, deleted, and never more than fit."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest

from apiserver import Server, read_all, running
from responding import (
    Service,
    events,
    made,
    post,
    until,
    until_idle,
)
from ropeway.errors import NumericalError, RopewayError
from ropeway.service.request import TextRequest
from waiting import until as reached


def test_a_background_response_from_the_queue_to_its_end(responses: Server, held: Callable[[], None]) -> None:
    client = responses.client()
    queued = client.responses.create(model="echo", input="hello", background=True)
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    assert client.responses.retrieve(queued.id).status == "queued"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo", input="on", previous_response_id=queued.id)
    assert caught.value.param == "previous_response_id"
    held()
    done = until(responses, queued.id, "completed")
    assert done["output"][0]["content"][0]["text"] == "hello"
    assert done["usage"]["total_tokens"] == 10
    again = client.responses.cancel(queued.id)
    assert again.status == "completed"
    refused = responses.http.get(f"/v1/responses/{queued.id}", params={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


def test_a_background_stream_can_be_left_and_found_again(responses: Server, held: Callable[[], None]) -> None:
    client = responses.client()
    stream = client.responses.create(model="echo", input="hello", background=True, stream=True)
    first = next(iter(stream))
    assert first.type == "response.created"
    assert first.response.status == "queued"
    stream.close()
    held()
    until(responses, first.response.id, "completed")
    path = f"/v1/responses/{first.response.id}"
    everything = events(responses.http.get(path, params={"stream": "true"}))
    assert [event["type"] for event in everything[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert everything[-1]["response"]["output"][0]["content"][0]["text"] == "hello"
    for start in (0, 5, len(everything) - 2, len(everything) + 5):
        rest = events(responses.http.get(path, params={"stream": "true", "starting_after": start}))
        assert rest == everything[start + 1 :]
    wrong = responses.http.get(path, params={"stream": "true", "starting_after": "x"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "starting_after")


def test_whoever_follows_a_stream_gets_all_of_it(responses: Server, held: Callable[[], None]) -> None:
    stream = responses.client().responses.create(model="echo", input="hello", background=True, stream=True)
    name = next(iter(stream)).response.id  # type: ignore[union-attr]
    others = [responses.client().responses.retrieve(name, stream=True) for _ in range(3)]
    held()
    ends = [[event.type for event in other][-1] for other in (stream, *others)]
    assert ends == ["response.completed"] * 4


def test_a_cancelled_response_is_cancelled_once_and_for_all(
    responses: Server, service: Service, held: Callable[[], None]
) -> None:
    stream = responses.client().responses.create(model="echo", input="hello", background=True, stream=True)
    name = next(iter(stream)).response.id  # type: ignore[union-attr]
    cancelled = responses.client().responses.cancel(name)
    assert cancelled.status == "cancelled"
    assert [event.type for event in stream][-1] == "response.cancelled"
    until_idle(service)
    held()
    assert responses.client().responses.cancel(name).status == "cancelled"
    assert responses.http.get(f"/v1/responses/{name}").json()["status"] == "cancelled"
    plain = made(responses, input="x")["id"]
    refused = responses.http.post(f"/v1/responses/{plain}/cancel")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_id")


def test_a_request_that_is_cancelled_by_its_id_is_a_cancelled_response(responses: Server, service: Service) -> None:
    service.delay = 30.0
    name = made(responses, input="hello", background=True)["id"]
    service.delay = 0.0
    assert responses.http.delete(f"/v1/requests/{name}").status_code == 200
    assert until(responses, name, "cancelled", "failed", "completed")["status"] == "cancelled"


def test_a_deleted_response_takes_nobodys_time(responses: Server, service: Service, held: Callable[[], None]) -> None:
    stream = responses.client().responses.create(model="echo", input="hello", background=True, stream=True)
    name = next(iter(stream)).response.id  # type: ignore[union-attr]
    responses.client().responses.delete(name)
    until_idle(service)
    assert [event.type for event in stream][-1] == "response.cancelled"
    assert responses.http.get(f"/v1/responses/{name}").status_code == 404


def test_what_cannot_run_is_refused_at_once(responses: Server) -> None:
    before = len(responses.app.state.responses)
    refused = post(responses, input="x" * 5000, background=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert post(responses, input="x", background=True, store=False).json()["error"]["param"] == "store"
    assert post(responses, input="x", background=True, callback_url=5).json()["error"]["param"] == "callback_url"
    assert len(responses.app.state.responses) == before


def failing(request: TextRequest, sent: int) -> RopewayError | None:
    return NumericalError("The model produced NaN.") if sent == 3 else None


def test_a_failure_is_the_end_of_a_response() -> None:
    with running(Service(failure=failing)) as responses:
        failed = until(responses, made(responses, input="hello", background=True)["id"], "failed")
        assert failed["error"] == {"code": "server_error", "message": "The model produced NaN."}
        assert (failed["output"][0]["status"], failed["output"][0]["content"][0]["text"]) == ("incomplete", "hel")
        found = events(post(responses, input="hello", stream=True))
        assert found[-1]["type"] == "response.failed"
        assert found[-1]["response"]["output"] == [failed["output"][0] | {"id": found[2]["item"]["id"]}]
        assert post(responses, input="hello").status_code == 500


@pytest.mark.parametrize("how", ["engine", "shutdown"])
def test_what_is_under_way_ends_with_the_engine_and_with_the_server(how: str) -> None:
    service = Service(delay=30.0)
    with running(service) as responses:
        stream = responses.client().responses.create(model="echo", input="hello", background=True, stream=True)
        name = next(iter(stream)).response.id  # type: ignore[union-attr]
        if how == "engine":
            responses.call(service.die)
            assert until(responses, name, "failed")["error"]["code"] == "server_error"
        else:
            responses.stop()
        last = list(stream)[-1]
        assert last.type == "response.failed"
        assert last.response.status == "failed"


def test_whoever_follows_a_silent_response_is_kept() -> None:
    service = Service()
    service.opened.clear()
    with running(service, keep_alive_interval=0.02) as responses:
        with responses.client().responses.create(model="echo", input="hello", background=True, stream=True) as stream:
            name = next(iter(stream)).response.id  # type: ignore[union-attr]
        with responses.http.stream("GET", f"/v1/responses/{name}?stream=true") as following:
            lines = following.iter_lines()
            assert ": keep-alive" in lines, "it has ended"
            assert ": keep-alive" in lines
            responses.call(service.opened.set)
            assert "event: response.completed" in lines


def test_a_full_store_refuses_what_it_could_not_keep() -> None:
    service = Service()
    service.opened.clear()
    with running(service, response_store_count=2) as responses:
        names = [made(responses, input="hello", background=True)["id"] for _ in range(2)]
        refused = post(responses, input="hello", background=True)
        assert (refused.status_code, refused.json()["error"]["param"]) == (503, "background")
        assert refused.headers["retry-after"]
        responses.call(service.opened.set)
        assert all(until(responses, name, "completed") for name in names)
        until(responses, made(responses, input="hello", background=True)["id"], "completed")
        assert len(responses.app.state.responses) == 2


def test_a_stream_that_outgrows_the_store_fails_and_the_server_goes_on() -> None:
    with running(Service(max_model_len=60000), response_store_mib=0.1) as responses:
        failed = until(responses, made(responses, input="x" * 20000, background=True, stream=False)["id"], "completed")
        assert len(failed["output"][0]["content"][0]["text"]) == 20000
        found = events(post(responses, input="x" * 20000, background=True, stream=True))
        assert found[-1]["type"] == "response.failed"
        assert found[-1]["response"]["error"]["code"] == "rate_limit_exceeded"
        assert responses.app.state.responses.size <= 0.1 * 1024 * 1024
        refused = post(responses, input="x" * 59000 + "é" * 60000, background=True)
        assert refused.status_code == 400
        assert made(responses, input="hello")["status"] == "completed"


def test_whoever_follows_and_does_not_read_is_dropped() -> None:
    with running(Service(max_model_len=70000), stream_timeout=1.0, keep_alive_interval=0.05) as responses:
        name = made_in_background(responses, "x" * 30000)
        last = f"GET /v1/responses/{name}?stream=true HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        with responses.connect() as raw:
            raw.sendall(last)
            reached(lambda: responses.answering)
            reached(lambda: not responses.answering)
            assert b"response.completed" not in read_all(raw)
        assert "event: response.completed" in responses.http.get(f"/v1/responses/{name}?stream=true").text[-100_000:]


def made_in_background(responses: Server, text: str) -> str:
    """The id of a response that was made as a stream in the background, and has ended."""
    with responses.client().responses.create(model="echo", input=text, background=True, stream=True) as stream:
        name = str(next(iter(stream)).response.id)  # type: ignore[union-attr]
    reached(lambda: responses.app.state.responses.get("", name).final)
    return name
