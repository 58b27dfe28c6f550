"""What several end-to-end tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from running import ADMIN, Server, serving

import apiserver
from devtools import Browser, browsing
from responding import Service
from ropeway.service.echo import EchoService
from ropeway.text.dialect import choose
from ropeway.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def bundled() -> Iterator[Server]:
    """A real server of the bundled model, for tests that neither hurt nor fill it."""
    with serving("--admin-key", ADMIN, "--tool-call-parser", "hermes") as server:
        yield server


@pytest.fixture(scope="session")
def echoing() -> Iterator[apiserver.Server]:
    """A server whose answer is the last message, which it reads as Hermes' models write: a message can be a call."""
    tokenizer = ByteTokenizer()
    with apiserver.running(
        EchoService(tokenizer=tokenizer, dialect=choose(tokenizer, "", tool_call_parser="hermes"))
    ) as up:
        yield up


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """For modules that are skipped where none is installed."""
    with browsing(tmp_path_factory.mktemp("browser")) as up:
        yield up


@pytest.fixture(scope="module")
def service() -> Service:
    """The service of `responses`."""
    return Service()


@pytest.fixture(scope="module")
def responses(service: Service) -> Iterator[apiserver.Server]:
    """A server of the Responses API around an echo."""
    with apiserver.running(service, tenant_header="X-Tenant") as up:
        yield up


@pytest.fixture
def held(responses: apiserver.Server, service: Service) -> Iterator[Callable[[], None]]:
    """Nothing is said by `responses` until this is called, or the test is over."""
    responses.call(service.opened.clear)

    def let_go() -> None:
        responses.call(service.opened.set)

    yield let_go
    let_go()
