"""One server for the tests of files and batches in a module."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest
from batchkit import KEYS, Slow

from apiserver import Server, running


@pytest.fixture(scope="module")
def service() -> Slow:
    return Slow()


@pytest.fixture(scope="module")
def server(service: Slow, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    settings = {"max_file_mib": 1.0, "max_batch_requests": 50, "webhook_allow": "127.0.0.1"}
    with running(service, data_dir=str(folder), api_key=",".join(KEYS), **settings) as up:
        yield up


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client(api_key=KEYS[0])


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=60) as http:
        yield http
