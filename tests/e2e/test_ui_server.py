"""The page before a real server: its batch under load, a request ended from its seat, and a chat with its timeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
from running import ADMIN, Server

from devtools import Browser, Page, installed

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed")
TAKEN = "Number(document.querySelectorAll('.tiles b')[4].innerText.split(' ')[0])"


@pytest.fixture
def page(browser: Browser, bundled: Server) -> Iterator[Page]:
    opened = browser.page(f"{bundled.url}/ui/")
    yield opened
    opened.close()
    assert opened.problems == []
    assert {url for url in opened.requests if not url.startswith(f"{bundled.url}/")} == set()


@contextmanager
def load(url: str, clients: int) -> Iterator[None]:
    """So many clients who ask for one story after another."""
    over = threading.Event()

    def client(number: int) -> None:
        while not over.is_set():
            body = {"model": "bundled", "max_tokens": 400 + 40 * (number % 5), "ignore_eos": True, "seed": number,
                    "messages": [{"role": "user", "content": f"Story {number}. " + "Once more. " * (number % 7 * 4)}],
                    "priority": ("high", "medium", "low")[number % 3]}  # fmt: skip
            httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(120)


def test_the_batch_under_load(page: Page, bundled: Server) -> None:
    with load(bundled.url, 40):  # 32 seats
        page.until(f"{TAKEN} > 10", 40)  # without native kernels background work waits
        page.until("document.querySelector('.news').innerText.includes('finished')", 40)
        page.until("document.querySelector('.line .who')", 40)
        page.until("/\\d/.test(document.querySelector('.tiles b').innerText)")
        assert "in use" in page.run("document.querySelector('main').innerText")
    page.until(f"{TAKEN} === 0", 60)


def test_a_request_is_ended_from_its_seat(page: Page, bundled: Server) -> None:
    found: list[httpx2.Response] = []
    # With this many choices it lasts, and is found on the first seats.
    body = {"model": "bundled", "n": 16, "max_tokens": 1900, "ignore_eos": True, "prompt": "A very long story"}

    def ask() -> None:
        found.append(httpx2.post(f"{bundled.url}/v1/completions", json=body, timeout=120))

    thread = threading.Thread(target=ask)
    thread.start()
    page.until(f"{TAKEN} === 16")
    page.run("document.querySelector('#track').focus()")
    label = "document.querySelector('.unseen').textContent"
    for _ in range(32):  # seats
        page.press("ArrowDown")
        if "of prompt" in page.run(label):
            break
    page.press("Enter")
    page.until("document.querySelector('dialog .life')")
    page.click("dialog button.danger", "Cancel it")
    page.click("dialog.ask button.danger", "End it")
    thread.join(60)
    assert not thread.is_alive()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (499, "request_cancelled")


def test_a_chat_with_its_timeline(page: Page) -> None:
    page.write("Once upon a time")
    page.press("Enter")
    page.until("document.querySelector('.turn .life .bar .decode')", 40)
    told = page.run("document.querySelector('.turn .life').innerText")
    assert "read its prompt" in told
    assert "wrote" in told


def test_the_operator_changes_the_policy_and_pins_a_prefix(page: Page) -> None:
    page.turn(6)
    page.click("main button", "Enter keys")
    page.fill("dialog.keys .field:nth-of-type(2) input", ADMIN)
    page.click("dialog.keys button", "Use them")
    page.until("document.querySelector('main').innerText.includes('Requests board by')")
    for policy in ("sjf", "priority"):
        page.until("document.querySelector('main select[aria-label=Policy]')")
        page.run("document.querySelector('main select[aria-label=Policy]').focus()")
        page.fill("main select[aria-label=Policy]", policy)
        page.click("main button", "Board by it")
        page.until(f"document.querySelector('main').innerText.includes('Requests board by {policy};')")
    page.click("main button", "Pin a prefix")
    page.fill("dialog input", "support")
    page.fill("dialog textarea", "You answer questions about cable cars, and ask when something is not clear. " * 4)
    page.click("dialog button", "Compute and pin")
    page.until("document.querySelector('main').innerText.includes('support')")
    page.click("main button.danger", "Give up")
    page.click("dialog.ask button.danger", "Give it up")
    page.until("document.querySelector('main').innerText.includes('No prefix is pinned')")
