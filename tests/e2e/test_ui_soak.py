"""The feed of a busy server for as long as one likes, many times as fast as usual, to a browser and to somebody who
reads slowly. At four frames a second two hours are 28,800:

    ROPEWAY_UI_FRAMES=28800 pytest -s tests/e2e/test_ui_soak.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from devtools import Page, browsing, installed

FRAMES = int(os.environ.get("ROPEWAY_UI_FRAMES", "1200"))
PARTS = 4
PATIENCE = 60 + FRAMES / 20
"""Seconds for each part."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60 + PARTS * PATIENCE),
    pytest.mark.skipif(installed() is None, reason="no Chromium is installed"),
]
SPARE = 1 << 20
"""Bytes by which the server may grow after the first part: less than what it sends of frames in the others."""


class Watched:
    """A server in a process of its own, all of whose frames are wanted at once."""

    def __init__(self) -> None:
        program = Path(__file__).parents[1] / "watchedserver.py"
        self._process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url, "the server has ended"

    def numbers(self) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(60) == 0
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


@pytest.fixture
def server() -> Iterator[Watched]:
    watched = Watched()
    try:
        yield watched
    finally:
        watched.close()


@contextmanager
def slow_reader(url: str) -> Iterator[list[int]]:
    """Somebody who reads a little now and then, through as small a window as there is. Gives what each read was."""
    over, reads = threading.Event(), list[int]()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((urlsplit(url).hostname, urlsplit(url).port))
        raw.sendall(b"GET /ui/feed HTTP/1.1\r\nhost: localhost\r\n\r\n")
        raw.settimeout(20)

        def read() -> None:
            while not over.wait(0.02):
                reads.append(len(raw.recv(1024)))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield reads
        finally:
            over.set()
            thread.join(30)
    assert reads
    assert all(reads), "the server has let go of somebody who reads"


def counted(page: Page) -> list[int]:
    """The bytes that the page is sent from now on, as they come."""
    sizes, hear = list[int](), page.hear

    def listen(method: str, params: dict[str, Any]) -> None:
        if method == "Network.dataReceived":
            sizes.append(params["dataLength"])
        hear(method, params)

    page.hear = listen  # type: ignore[method-assign]
    return sizes


def test_memory_of_server_and_browser_stays_flat(server: Watched, tmp_path: Path) -> None:
    frame = len(httpx2.get(f"{server.url}/ui/feed?frames=1").content)
    with browsing(tmp_path) as browser, slow_reader(server.url):
        page = browser.page()
        sent = counted(page)
        page.open(f"{server.url}/ui/")
        begun, measured = time.monotonic(), list[tuple[int, int]]()
        for part in range(1, PARTS + 1):
            limit = time.monotonic() + PATIENCE
            while sum(sent) < frame * FRAMES * part / PARTS:
                assert time.monotonic() < limit, f"{sum(sent)} of {frame * FRAMES} bytes have come"
                time.sleep(0.02)
            # Frames come between the collection of garbage and the look at what is left.
            measured.append((server.numbers()["rss"], min(page.heap() for _ in range(3))))
        seconds = time.monotonic() - begun
        page.until("document.querySelector('.tiles b').innerText !== '–'")
        nodes = page.run("document.querySelectorAll('*').length")
        page.close()
    looks = server.numbers()["looks"]
    shown = ", ".join(f"{rss / 2**20:.1f} and {heap / 2**20:.2f}" for rss, heap in measured)
    print(f"{FRAMES} frames of {frame:,} bytes in {seconds:.0f} s, {looks} looks; MiB of server and page: {shown}")
    assert page.problems == []
    assert nodes < 1500
    (rss, heap), *later = measured
    assert max(one for one, _ in later) < rss + SPARE, measured
    assert max(one for _, one in later) < 1.15 * heap + 500_000, measured
