"""The description at /openapi.json against the server: generated requests, right ones and wrong ones, on every route.

No answer may be a server's error, and each has to be what the description says. What a description cannot say (that a
token id is below the vocabulary's size, that one of several fields is needed) may be refused though it fits: right data
is therefore not required to be accepted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from running import ADMIN
from running import Server as Process
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from apiserver import Server, running
from ropeway.api.app import create_app, describe
from ropeway.config import ServerConfig
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService
from ropeway.text.dialect import choose
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer

EXAMPLES = int(os.environ.get("ROPEWAY_SCHEMA_EXAMPLES", "12"))
"""Random ones, for each route, besides those that cover each field's edges."""


def no_fault_of_the_server(ctx: Any, response: Any, case: schemathesis.Case) -> bool | None:
    """No 5xx, unless the client's own deadline has passed, of which a generated one may be a millisecond."""
    if response.status_code == 504 and b'"request_timeout"' in response.content:
        return None
    return not_a_server_error(ctx, response, case)


HOLDS = [
    no_fault_of_the_server,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.ignored_auth,
    checks.missing_required_header,
    checks.negative_data_rejection,
]
LENIENT = ("/v1/responses", "/v1/messages")
"""What clients send back here of an earlier answer is read as far as it is needed, and no further."""


def description() -> dict[str, Any]:
    service = EchoService()
    return describe(create_app(service, ServerConfig(), Metrics(service.model_name)))


api = schemathesis.openapi.from_dict(description())


@api.auth()
class Key:
    def get(self, case: schemathesis.Case, context: schemathesis.AuthContext) -> str:
        return ADMIN

    def set(self, case: schemathesis.Case, data: str, context: schemathesis.AuthContext) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = ChatTemplate("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    dialect = choose(ByteTokenizer(), "", tool_call_parser="hermes")
    data = str(tmp_path_factory.mktemp("data"))
    with running(EchoService(template=template, dialect=dialect), admin_key=ADMIN, data_dir=data) as up:
        yield up
    template.close()


@api.exclude(path="/admin/keys", method="POST").parametrize()  # it closes a server: see test_api_keys.py
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_every_route_is_as_described(case: schemathesis.Case, echo: Server) -> None:
    lenient = case.path.startswith(LENIENT)
    holds = [check for check in HOLDS if not (lenient and check is checks.negative_data_rejection)]
    case.call_and_validate(base_url=echo.url, checks=holds, timeout=30)


def test_the_real_server_is_described_by_the_same(bundled: Process) -> None:
    with httpx2.Client(base_url=bundled.url, timeout=60) as http:
        found = http.get("/openapi.json").json()
    assert found == description()


engine = schemathesis.openapi.from_dict(description())
engine.config.phases.coverage.enabled = False  # edges of fields are the HTTP side's to refuse
engine.config.generation.update(modes=[GenerationMode.POSITIVE])


@engine.include(
    path_regex=r"^/v1/(chat/completions|completions|responses|messages|embeddings|score|rerank)$"
).parametrize()
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
def test_the_engine_survives_what_fits_the_description(case: schemathesis.Case, bundled: Process) -> None:
    if isinstance(case.body, dict):  # an answer as long as the context would be no better a test
        case.body = {**case.body, "max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 16}
    case.call_and_validate(base_url=bundled.url, checks=[no_fault_of_the_server], timeout=60)
