"""A browser for tests: Chromium without a window, spoken to through pipes in its DevTools protocol."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--mute-audio", "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip

_FDS = """
import fcntl, os, sys
to, back = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 64) for fd in sys.argv[1:3])
os.dup2(to, 3)
os.dup2(back, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from its file descriptor 3 and answers on 4."""


def installed() -> str | None:
    """The browser's program, if there is one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Browser:
    """A running browser. Its pages share nothing with the user's own."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        command = [sys.executable, "-S", "-c", _FDS, str(commands), str(answers), program]
        self._process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._listen, name="devtools", daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        number = next(self._numbers)
        answer = self._waiting[number] = queue.SimpleQueue()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        found = answer.get(timeout=60)
        assert "error" not in found, f"{method}: {found['error']}"
        return dict(found["result"])

    def page(self, url: str = "about:blank", *, width: int = 1280, height: int = 900) -> Page:
        """A new page of that size."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        if url != "about:blank":
            page.open(url)
        return page

    def close(self) -> None:
        os.close(self._write)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(60)
        os.close(self._read)

    def _listen(self) -> None:
        rest = b""
        while True:
            data = os.read(self._read, 1 << 20)
            if not data:
                return
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._waiting.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].hear(message["method"], message["params"])


class Page:
    """A page, and what has happened to it: `problems` are errors and warnings of its scripts, policies and styles,
    `refused` those of the network, `requests` the addresses that it has asked for."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.problems: list[str] = []
        self.refused: list[str] = []
        self.requests: list[str] = []
        self._browser = browser
        self._target = target
        self._session = session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, **features: str) -> None:
        """What the user prefers, such as `prefers-color-scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is. Raises AssertionError with what it threw."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True,
            allowUnsafeEvalBlockedByCSP=False,
        )  # fmt: skip
        wrong = found.get("exceptionDetails")
        assert wrong is None, wrong and wrong.get("exception", {}).get("description", wrong)
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true; returns its value."""
        limit = time.monotonic() + seconds
        while True:
            found = self.run(script)
            if found or found == {}:  # an element
                return found
            shown = self.run("document.body?.innerText.slice(0, 2000)")
            assert time.monotonic() < limit, f"not within {seconds} s: {script}\n{shown}\n{self.problems}"
            time.sleep(0.05)

    def click(self, selector: str, text: str = "") -> None:
        """Press the first element of that selector which has that text, as soon as it is there."""
        fits = f"e => e.innerText.includes({json.dumps(text)}) && !e.disabled"
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find({fits})"
        self.until(f"Boolean({found})")
        self.run(f"{found}.click()")

    def turn(self, number: int) -> None:
        """To a page of the page, by the number that its key is."""
        self.run("document.activeElement.blur()")
        self.press(str(number))

    def fill(self, selector: str, value: str) -> None:
        self.run(
            f"(e => {{ e.value = {json.dumps(value)}; for (const kind of ['input', 'change']) "
            f"e.dispatchEvent(new Event(kind, {{bubbles: true}})); }})(document.querySelector({json.dumps(selector)}))"
        )

    def write(self, text: str) -> None:
        """What is to be said in the playground."""
        self.turn(2)
        self.until("document.querySelector('.settings select')?.options.length")
        self.run("document.querySelector('#say').focus()")
        self.send("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        self.until(f"document.querySelector({json.dumps(selector)})")
        node = self.send("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.send("DOM.setFileInputFiles", files=[str(file)], objectId=node["objectId"])

    def press(self, key: str) -> None:
        """A key, such as `d` or `ArrowDown`, to whatever has the focus."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def heap(self) -> int:
        """Bytes of script data that are still needed."""
        self.send("HeapProfiler.collectGarbage")
        metrics = self.send("Performance.getMetrics")["metrics"]
        return int(next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize"))

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)

    def hear(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.problems.append(str(details.get("exception", {}).get("description", details.get("text"))))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(str([one.get("value", one.get("description")) for one in params["args"]]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                told = self.refused if entry["source"] == "network" else self.problems
                told.append(f"{entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser, ended with all of its processes."""
    program = installed()
    assert program is not None, f"none of {', '.join(NAMES)} is installed"
    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()
