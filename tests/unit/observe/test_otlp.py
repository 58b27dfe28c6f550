"""Spans as collectors want them, and the header that says whose they are."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from ropeway.errors import ConfigError
from ropeway.observe.otlp import SERVER, Collector, Parent, Span, encode, new_span, new_trace, parent_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{PARENT}-01", Parent(TRACE, PARENT, True)),
        (f" 00-{TRACE}-{PARENT}-00 ", Parent(TRACE, PARENT, False)),
        (f"00-{TRACE}-{PARENT}-03", Parent(TRACE, PARENT, True)),
        (f"01-{TRACE}-{PARENT}-01-later", Parent(TRACE, PARENT, True)),
        (f"00-{TRACE}-{PARENT}-01-later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{PARENT}", None),
        (f"00-{TRACE[1:]}-{PARENT}-01", None),
        ("", None),
        (f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01", None),
    ],
)
def test_the_header_of_a_trace(header: str, found: Parent | None) -> None:
    assert parent_of(header) == found


def test_a_span_in_json() -> None:
    span = Span(
        trace_id=TRACE, span_id=PARENT, parent_id="00f067aa0ba902b7", name="chat m", kind=SERVER, begin=1_700_000_000.5,
        end=1_700_000_001.25, attributes={"text": "x", "whole": 2**40, "share": 0.5, "yes": True, "list": ["a", "b"]},
        events=[(1_700_000_001.0, "chunk", {"n": 1})], error="it failed",
    )  # fmt: skip
    body: Any = json.loads(encode([span], {"service.name": "ropeway"}))
    [resource] = body["resourceSpans"]
    assert resource["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "ropeway"}}]
    [scope] = resource["scopeSpans"]
    assert scope["spans"] == [
        {
            "traceId": TRACE, "spanId": PARENT, "parentSpanId": "00f067aa0ba902b7", "name": "chat m", "kind": 2,
            "startTimeUnixNano": "1700000000500000000", "endTimeUnixNano": "1700000001250000000",
            "attributes": [
                {"key": "text", "value": {"stringValue": "x"}},
                {"key": "whole", "value": {"intValue": "1099511627776"}},
                {"key": "share", "value": {"doubleValue": 0.5}},
                {"key": "yes", "value": {"boolValue": True}},
                {"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "a"}, {"stringValue": "b"}]}}},
            ],
            "events": [
                {
                    "timeUnixNano": "1700000001000000000", "name": "chunk",
                    "attributes": [{"key": "n", "value": {"intValue": "1"}}],
                }
            ],
            "status": {"code": 2, "message": "it failed"},
        }
    ]  # fmt: skip
    assert len(new_trace()) == 32
    assert len(new_span()) == 16


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://host", "http://", "", "http://[::1", "http://here:port"])
def test_an_endpoint_must_be_an_address(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        Collector(endpoint)


@pytest.mark.parametrize("headers", ["novalue", "a b=c", "x=a\nb"])
def test_headers_must_be_headers(headers: str) -> None:
    with pytest.raises(ConfigError, match="otlp_headers"):
        Collector("http://127.0.0.1:4318", headers)


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/custom/traces", "http://127.0.0.1:4318/custom/traces"),
    ],
)
async def test_a_collector_that_fails_loses_spans_and_says_so_once(
    endpoint: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if len(asked) == 1:
            raise httpx2.ConnectError("nobody is there")
        return httpx2.Response(503 if len(asked) == 2 else 200)

    collector = Collector(endpoint, "x-key = secret", clock=lambda: 5.0)
    await collector._http.aclose()
    collector._http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer), headers=collector._http.headers)
    span = Span(trace_id=TRACE, name="n", begin=1.0, end=2.0)
    with caplog.at_level("WARNING", "ropeway"):
        for _ in range(3):
            await collector.send([span, span])
    await collector.close()
    assert [str(request.url) for request in asked] == [url] * 3
    assert {request.headers["x-key"] for request in asked} == {"secret"}
    assert collector.lost == 4
    assert len([record for record in caplog.records if "spans are lost" in record.message]) == 1
