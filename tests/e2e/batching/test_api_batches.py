"""Files, batches and deferred requests over real HTTP, by OpenAI's own client where it has words for them."""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from batchkit import (
    KEYS,
    MIB,
    Slow,
    ended,
    line,
    lines,
    read,
    run,
    until,
    upload,
)

from apiserver import Server, read_all, running
from ropeway.contract import Urgency


def test_a_batch_from_upload_to_answers(client: openai.OpenAI, server: Server, service: Slow) -> None:
    service.requests.clear()
    wanted = [line(f"r{n}", f"prompt {n}") for n in range(20)] + [line("bad", body={"model": "echo", "prompt": 7})]
    batch = run(client, lines(*wanted), metadata={"for": "a test"})
    assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"for": "a test"})
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    assert (batch.model, batch.usage.output_tokens > 20) == ("echo", True)
    answers = read(client, batch.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"r{n}" for n in range(20)]
    for n, one in enumerate(answers):
        response = one["response"]
        assert (response["status_code"], one["error"]) == (200, None)
        assert response["body"]["choices"][0]["text"] == f"prompt {n}"
        assert (one["id"][:10], response["request_id"]) == ("batch_req_", one["id"])
    [bad] = read(client, batch.error_file_id)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert bad["response"]["body"]["error"]["param"] == "prompt"
    assert {request.urgency for request in service.requests} == {Urgency.LOW}
    assert {request.deadline_s for request in service.requests} == {None}, "nobody waits, so nothing is late"
    tenants = {request.tenant for request in service.requests}
    client.completions.create(model="echo", prompt="now")
    assert tenants == {service.requests[-1].tenant}
    metrics = server.http.get("/metrics", headers={"authorization": f"Bearer {KEYS[0]}"}).text
    assert re.search(r"^ropeway_jobs_answered_total [1-9]", metrics, re.MULTILINE)
    assert re.search(r'^ropeway_jobs_waiting{urgency="low"} 0', metrics, re.MULTILINE)
    made = client.files.retrieve(batch.output_file_id)
    assert (made.purpose, made.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_an_answer_of_a_batch_is_that_of_http(client: openai.OpenAI, http: httpx2.Client) -> None:
    """In every dialect, but for what is new in each answer: names and times."""
    hello = [{"role": "user", "content": "hello"}]
    for url, body in {
        "/v1/chat/completions": {"messages": hello, "logprobs": True, "n": 2, "seed": 1},
        "/v1/completions": {"prompt": ["a", "b"], "echo": True},
        "/v1/embeddings": {"input": ["a", "bc"], "encoding_format": "base64"},
        "/v1/responses": {"input": "hello", "store": False},
        "/v1/messages": {"messages": hello, "max_tokens": 9},
        "/v1/score": {"text_1": "a", "text_2": ["a", "b"]},
        "/v1/rerank": {"query": "a", "documents": ["a", "b"]},
    }.items():
        body = {"model": "echo", **body}
        batch = run(client, lines(line("one", url=url, body=body)), endpoint=url)
        assert batch.status == "completed", (url, batch.errors)
        found = read(client, batch.output_file_id)[0]["response"]
        direct = http.post(url, json=body)
        assert found["status_code"] == direct.status_code == 200, (url, found)
        assert unnamed(found["body"]) == unnamed(direct.json()), url


def unnamed(value: Any) -> Any:
    """Without what differs from answer to answer."""
    if isinstance(value, dict):
        times = ("id", "created", "created_at", "completed_at")
        return {name: unnamed(one) for name, one in value.items() if name not in times}
    return [unnamed(one) for one in value] if isinstance(value, list) else value


def test_files_as_the_client_uses_them(client: openai.OpenAI) -> None:
    content = lines(line("a"), line("b"))
    kept = client.files.create(
        file=("mine ü.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (kept.object, kept.bytes, kept.filename, kept.purpose) == ("file", len(content), "mine ü.jsonl", "batch")
    assert (kept.status, kept.expires_at) == ("processed", kept.created_at + 3600)
    assert client.files.content(kept.id).read() == content
    assert client.files.retrieve(kept.id).model_dump() == kept.model_dump()
    others = [upload(client, b"{}\n") for _ in range(3)]
    newest = [one.id for one in client.files.list(limit=2)]  # the client turns the pages
    assert newest[:4] == [*reversed(others), kept.id]
    page = client.files.list(limit=2, order="desc")
    assert ([one.id for one in page.data], page.has_more) == ([others[2], others[1]], True)
    assert client.files.list(after=others[1], limit=1).data[0].id == others[0]
    assert {one.purpose for one in client.files.list(purpose="batch")} == {"batch"}
    gone = client.files.delete(kept.id)
    assert (gone.id, gone.deleted) == (kept.id, True)
    for look in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(kept.id)


def test_a_file_whose_bytes_have_vanished_is_not_there(client: openai.OpenAI, server: Server) -> None:
    name = upload(client, lines(line("a")))
    (Path(server.config.data_dir or "") / "files" / name).unlink()
    with pytest.raises(openai.NotFoundError):
        client.files.content(name)


def test_whoever_takes_nothing_of_a_file_is_dropped() -> None:
    with running(Slow(), max_file_mib=64.0, stream_timeout=0.3) as server:
        name = upload(server.client(), b"x" * 32 * MIB)
        with server.connect() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            raw.sendall(f"GET /v1/files/{name}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            until(lambda: server.answering)
            until(lambda: not server.answering)
            assert 0 < len(read_all(raw)) < 32 * MIB
        assert len(server.client().files.content(name).read()) == 32 * MIB


def test_nobody_sees_what_is_anothers(client: openai.OpenAI, server: Server) -> None:
    other = server.client(api_key=KEYS[1])
    mine = upload(client, lines(line("a")))
    batch = run(client, lines(line("a")))
    for look in (
        lambda: other.files.retrieve(mine),
        lambda: other.files.content(mine),
        lambda: other.files.delete(mine),
        lambda: other.files.content(batch.output_file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            look()
    with pytest.raises(openai.BadRequestError) as refused:
        other.batches.create(input_file_id=mine, endpoint="/v1/completions", completion_window="24h")
    assert refused.value.param == "input_file_id"
    assert mine not in [one.id for one in other.files.list()]
    assert batch.id not in [one.id for one in other.batches.list()]
    assert mine in [one.id for one in client.files.list()]
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    with pytest.raises(openai.BadRequestError):
        other.files.list(after=mine)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "batch"}, "file"),
        ({"file": ("a.jsonl", b"{}")}, "purpose"),
        ({"file": ("a.jsonl", b"{}"), "purpose": "fine-tune"}, "purpose"),
        ({"file": ("a.txt", b"{}"), "purpose": "batch"}, "file"),
        ({"file": ("", b"{}"), "purpose": "batch"}, "file"),
        ({"file": ("\x1b.jsonl", b"{}"), "purpose": "batch"}, "file"),
        ({"file": ("a.jsonl", b"{}"), "purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        (
            {"file": ("a.jsonl", b""), "purpose": "batch", "expires_after[anchor]": "created_at",
             "expires_after[seconds]": "60"},
            "expires_after[seconds]",
        ),
        ({"file": ("a.jsonl", b"{}"), "purpose": "x" * 2000}, "purpose"),
    ],
)  # fmt: skip
def test_uploads_that_are_refused(http: httpx2.Client, form: dict[str, Any], param: str) -> None:
    files = {"file": form.pop("file")} if "file" in form else {"other": ("o", b"")}
    answer = http.post("/v1/files", files=files, data=form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_file_is_as_large_as_is_allowed_and_no_larger(
    client: openai.OpenAI, http: httpx2.Client, server: Server
) -> None:
    whole = b" " * (MIB - 1) + b"\n"
    name = upload(client, whole)
    assert client.files.retrieve(name).bytes == MIB
    with pytest.raises(openai.APIStatusError) as refused:
        upload(client, whole + b"x")
    assert refused.value.status_code == 413
    # One that does not say how long it is has to be counted.
    edge, endless = "edge", b"x" * 65536

    def chunks() -> Iterator[bytes]:
        yield f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'.encode()
        for _ in range(64):
            yield endless

    kind = {"content-type": f"multipart/form-data; boundary={edge}"}
    assert http.post("/v1/files", content=chunks(), headers=kind).status_code == 413
    assert http.post("/v1/files", json={}).status_code == 415
    folder = Path(str(server.config.data_dir)) / "files"
    assert not list(folder.glob("*.partial")), "what was refused is not kept"


def test_who_leaves_in_the_middle_of_a_file_leaves_nothing(client: openai.OpenAI, server: Server) -> None:
    upload(client, b"{}\n")
    folder = Path(str(server.config.data_dir)) / "files"
    before = sorted(path.name for path in folder.iterdir())
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer one-key\r\n"
            b"Content-Type: multipart/form-data; boundary=e\r\nContent-Length: 100000\r\n\r\n"
            b'--e\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nhalf of it'
        )
        until(lambda: list(folder.glob("*.partial")))
    until(lambda: sorted(path.name for path in folder.iterdir()), lambda names: names == before)


BAD_LINE = b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "echo", "prompt": '


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [("empty_file", None)]),
        (b"\n \r\n\n", [("empty_file", None)]),
        (lines(line("a")) + BAD_LINE + b"\n" + lines(line("c")), [("invalid_json_line", 2)]),
        (lines(line("a"), line("b"), line("a")), [("duplicate_custom_id", 3)]),
        (lines(line("a", url="/v1/embeddings")), [("url_mismatch", 1)]),
        (lines(line("a", method="GET")), [("invalid_method", 1)]),
        (lines(line("a"), line("b", body={"model": "other", "prompt": "x"})), [("model_mismatch", 2)]),
        (lines(line("a", body={"model": "unknown", "prompt": "x"})), [("model_not_found", 1)]),
        (lines(line("a", body={"model": "echo", "prompt": "x", "stream": True})), [("unsupported_value", 1)]),
        (lines(*(line(str(n)) for n in range(51))), [("too_many_tasks", None)]),
        (b"\xff\xfe{\x00}\x00", [("invalid_json_line", 1)]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    client: openai.OpenAI, content: bytes, expected: Sequence[tuple[str, int | None]]
) -> None:
    batch = run(client, content)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [(error.code, error.line) for error in batch.errors.data] == list(expected), batch.errors
    assert batch.failed_at is not None


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(line("a"), line("b")),
        lines(line("a"), line("b")).replace(b"\n", b"\r\n"),
        lines(line("a")) + b"\n\n" + lines(line("b")).rstrip(),
    ],
)
def test_files_as_editors_write_them(client: openai.OpenAI, content: bytes) -> None:
    batch = run(client, content)
    assert (batch.status, batch.request_counts.completed) == ("completed", 2), batch.errors


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, "input_file_id"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "900000d"}, "completion_window"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"callback_url": "file:///etc/passwd"}, "callback_url"),
        ({"callback_url": "https://10.0.0.1/"}, "callback_url"),
        ({"priority": "urgent"}, "priority"),
    ],
)
def test_batches_that_are_refused(
    client: openai.OpenAI, http: httpx2.Client, change: dict[str, Any], param: str
) -> None:
    name = upload(client, lines(line("a")))
    asked = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"} | change
    answer = http.post("/v1/batches", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_batch_says_how_urgent_it_is(client: openai.OpenAI, service: Slow) -> None:
    for fields, urgency in (
        ({"extra_body": {"service_tier": "flex"}}, Urgency.MEDIUM),
        ({"extra_body": {"priority": "high"}}, Urgency.MEDIUM),
        ({"extra_headers": {"x-ropeway-priority": "medium"}}, Urgency.MEDIUM),
        ({"extra_body": {"priority": "low"}}, Urgency.LOW),
    ):
        service.requests.clear()
        run(client, lines(line("a")), **fields)
        assert [request.urgency for request in service.requests] == [urgency]


def test_cancelling_keeps_what_is_there(client: openai.OpenAI) -> None:
    content = lines(line("quick"), *(line(f"s{n}", "slowly " * 9) for n in range(40)))
    batch = client.batches.create(
        input_file_id=upload(client, content), endpoint="/v1/completions", completion_window="24h"
    )
    until(lambda: client.batches.retrieve(batch.id), lambda one: one.request_counts.completed > 0)
    said = client.batches.cancel(batch.id)
    assert said.status in ("cancelling", "cancelled")
    over = ended(client, batch.id)
    assert (over.status, over.cancelled_at >= over.cancelling_at) == ("cancelled", True)
    answers, errors = read(client, over.output_file_id), read(client, over.error_file_id)
    assert len(answers) + len(errors) == 41
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled", "nothing is taken back"


def test_a_client_cannot_pass_for_the_inside(server: Server) -> None:
    """The gate believes a scope, never a header."""
    for headers in ({"ropeway.call": "1"}, {"x-ropeway-call": "{}"}, {}):
        assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 401


def test_what_is_read_slowly_does_not_stand_in_the_way(client: openai.OpenAI, server: Server) -> None:
    name = upload(client, b" " * (MIB - 1) + b"\n")
    with server.connect() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"GET /v1/files/{name}/content HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n\r\n"
        raw.sendall(head.encode())
        begun = time.monotonic()
        assert client.files.content(name).read().count(b" ") == MIB - 1
        assert time.monotonic() - begun < 20


def test_one_upload_at_a_time_in_a_form(http: httpx2.Client) -> None:
    answer = http.post(
        "/v1/files",
        files=[("file", ("a.jsonl", io.BytesIO(b"{}"))), ("file", ("b.jsonl", io.BytesIO(b"{}")))],
        data={"purpose": "batch"},
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
