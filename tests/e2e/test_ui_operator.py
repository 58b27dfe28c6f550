"""What an operator does on the page: canaries from start to end, and a batch from a file to its output."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiserver import Server
from devtools import Browser, Page, installed
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.outcome import Outcome
from uikit import Batch, StubFeed, showing
from waiting import until

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with showing(StubFeed(Batch()), admin_key="owner", data_dir=str(tmp_path)) as up:
        yield up


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    opened = browser.page(f"{server.url}/ui/#keys")
    opened.run("sessionStorage.setItem('ropeway.admin', 'owner')")
    yield opened
    opened.close()
    assert opened.problems == []


def test_a_canary_from_start_to_end(page: Page, server: Server, tmp_path: Path) -> None:
    seconds = itertools.count()
    canaries = Canaries(
        tmp_path / "canary.db", {"org/chat": ["old"]}, {"old", "new"}, clock=lambda: float(next(seconds))
    )
    server.app.state.canaries = canaries
    page.turn(7)
    page.until("document.querySelector('main').innerText.includes('No canary runs')")
    page.click("main button", "Try a canary")
    page.fill("dialog .field:nth-of-type(1) input", "org/chat")
    page.fill("dialog .field:nth-of-type(2) input", "new")
    page.click("dialog button", "Begin")
    page.until("document.querySelector('.trial')?.innerText.includes('old against new')")
    page.fill(".trial input[type=range]", "40")
    page.until("document.querySelector('.trial').innerText.includes('The canary gets 40 %')")
    until(lambda: canaries.states()[0].weight == 0.4)  # the page says so already while it asks

    def observe() -> None:
        splitter = canaries.splitter("org/chat")
        for key in map(str, range(600)):
            where = splitter.choose(key)
            took = 0.08 if where == "new" else 0.1
            splitter.observe(
                where, Outcome(status=200, latency_s=took, ttft_s=took / 4, itl_s=took / 50, streamed=True), key
            )

    server.call(observe)
    page.turn(6)
    page.turn(7)
    page.until(r"/latency\s+100 ms\s+80.0 ms/.test(document.querySelector('.trial')?.innerText)")
    page.click(".trial button", "Promote")
    page.click("dialog.ask button.danger", "Promote")
    page.until("document.querySelector('.trial .state.promoted')")
    page.click(".trial button", "Forget")
    page.until("document.querySelector('main').innerText.includes('No canary runs')")
    asyncio.run_coroutine_threadsafe(canaries.close(), server._loop).result(60)


def test_a_batch_from_a_file_to_its_output(page: Page, tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"line-{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "echo", "messages": [{"role": "user", "content": f"hello {n}"}]}}
        for n in range(3)
    ]  # fmt: skip
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    page.turn(4)
    page.click("main button", "New batch")
    page.choose_file("dialog input[type=file]", file)
    page.click("dialog button", "Begin")
    page.until("document.querySelector('.state.completed')", 40)
    page.until("document.querySelector('main').innerText.includes('3 of 3')")
    page.until("document.querySelector('main').innerText.includes('lines.jsonl')")
    page.click("main button", "Output")
    page.until(
        "performance.getEntriesByType('resource').some("
        r"e => /\/files\/[^/]+\/content$/.test(e.name) && e.responseStatus === 200)"
    )
