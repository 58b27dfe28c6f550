"""The page in a real browser: what it shows, what one can do there, and what it never does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from apiserver import Server
from devtools import Browser, Page, installed
from uikit import Batch, StubFeed, showing
from waiting import until

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed")

TABS = ("ropeway", "playground", "compare", "jobs", "keys", "models", "canary")
DRAWN = "document.querySelector('.tiles b')?.innerText > '' && document.querySelector('.tiles b').innerText !== '–'"
PICTURE = """new Promise(requestAnimationFrame).then(() => {
    const canvas = document.querySelector("#track");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
})"""


@pytest.fixture(scope="module")
def feed() -> StubFeed:
    return StubFeed(Batch())


@pytest.fixture(scope="module")
def server(feed: StubFeed) -> Iterator[Server]:
    with showing(feed, admin_key="owner") as up:
        yield up


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page that has done nothing wrong when the test is over, and has spoken to nobody else."""
    opened = browser.page(f"{server.url}/ui/")
    yield opened
    opened.close()
    assert opened.problems == []
    assert {url for url in opened.requests if not url.startswith(f"{server.url}/")} == set()


def test_the_batch_is_seen(page: Page) -> None:
    page.until(DRAWN)
    assert page.run(PICTURE) > 8, "colours on the canvas"
    page.until("document.querySelectorAll('.line li').length > 3")
    text = page.run("document.querySelector('main').innerText")
    assert "12 seats" in text
    assert "all 12 seats are taken" in text
    assert "host: 320 of 1,000" in text
    page.until("document.querySelector('.news').innerText.includes('finished')")
    page.until(r"/^\d+ \/ 12$/.test(document.querySelectorAll('.tiles b')[4].innerText)")
    page.run("document.querySelector('#track').focus()")
    page.press("ArrowDown")
    page.until("document.querySelector('.unseen').textContent.startsWith('Seat 0 ')")


def test_one_of_several_models_is_shown(browser: Browser) -> None:
    feed = StubFeed(Batch(model="small"), Batch(slots=3, seed=2, model="large"))
    with showing(feed) as server:
        page = browser.page(f"{server.url}/ui/")
        page.until(DRAWN)
        switch = "document.querySelector('main select[aria-label=Model]')"
        seats, about = "document.querySelectorAll('.tiles b')[4].innerText", "document.querySelector('.head').innerText"
        assert page.run(f"[...{switch}.options].map(one => one.value)") == ["small", "large"]
        page.until(f"{seats}.endsWith('/ 12') && {about}.includes('12 seats')")
        page.fill("main select[aria-label=Model]", "large")
        page.until(f"{seats}.endsWith('/ 3') && {about}.includes('3 seats')")
        page.until("document.querySelector('main').innerText.includes('all 3 seats are taken')")
        tall = page.run("document.querySelector('#track').clientHeight")
        page.fill("main select[aria-label=Model]", "small")
        page.until(f"{seats}.endsWith('/ 12') && document.querySelector('#track').clientHeight > {tall}")
        page.close()
    assert page.problems == []


def test_pages_turn_by_key_and_only_one_of_them_is_told_of_the_batch(page: Page, feed: StubFeed) -> None:
    page.until(DRAWN)
    until(lambda: feed.readers == 1)
    for number, name in enumerate(TABS, 1):
        page.turn(number)
        page.until(f"document.querySelector('#tab-{name}').getAttribute('aria-selected') === 'true'")
        page.until("document.querySelector('main').innerText.length > 60")
        assert page.run("document.querySelectorAll('main > *').length") == 1
    until(lambda: feed.readers == 0)
    page.turn(1)
    until(lambda: feed.readers == 1)


def test_a_chat_is_streamed_and_tells_its_life(page: Page) -> None:
    said = "Glück auf! <b>not bold</b> " + "and so on " * 12
    page.write(said)
    page.press("Enter")
    page.until("document.querySelector('.turn.assistant > p')?.innerText.length > 10")
    assert page.run("document.querySelector('.turn.assistant').getAttribute('aria-busy')") == "true", "it streams"
    page.until("document.querySelector('.turn.assistant').getAttribute('aria-busy') === 'false'")
    assert said.strip() in page.run("document.querySelector('.turn.assistant').textContent")
    page.until("document.querySelector('.turn .life')")
    assert page.run("document.querySelector('.turn .foot').innerText").startswith("stop ·")
    assert not page.run("document.querySelector('.turn > p b')"), "what a model says never becomes markup"


def test_an_answer_is_stopped(page: Page, server: Server) -> None:
    page.write("a long story " * 15)
    page.press("Enter")
    page.until("document.querySelector('.turn.assistant > p')?.innerText.length > 5")
    page.click("#stop")
    page.until("document.querySelector('.turn .foot').innerText.startsWith('stopped')")
    until(lambda: server.api.active == 0)


def test_a_request_is_cancelled(page: Page, server: Server) -> None:
    with server.client().chat.completions.create(
        model=server.service.model_name, stream=True, messages=[{"role": "user", "content": "wait " * 700}]
    ) as stream:
        next(iter(stream))
        page.turn(4)
        page.click("main button.danger", "Cancel")
        page.click("dialog button.danger", "End it")
        until(lambda: server.api.active == 0)  # the answer alone would take 35 s
        page.until("document.querySelector('.state.cancelled')")


def test_code_of_the_same_request(page: Page) -> None:
    page.write("it's fine")
    page.click("button", "Copy as curl")
    made = page.until("document.querySelector('dialog pre')?.innerText")
    assert "it'\\''s fine" in made
    assert "$ROPEWAY_API_KEY" in made
    page.press("Escape")
    page.until("!document.querySelector('dialog')")
    page.click("button", "Copy as Python")
    made = page.until("document.querySelector('dialog pre')?.innerText")
    compile(made, "example", "exec")
    assert "it's fine" in made


def test_static_against_continuous(page: Page) -> None:
    page.turn(3)
    page.until("document.querySelector('#totals')?.innerText.includes('better by')", 60)
    values = "[...document.querySelectorAll('.pair .tiles b')].map(b => b.innerText)"
    page.until(f"{values}.some(text => Number(text) > 0)")
    page.run(
        """(slider => { slider.value = 1000; slider.dispatchEvent(new Event("input")); })(
            document.querySelector(".compare input[type=range]"))"""
    )
    found = page.run(values)
    assert found[3] == found[8] == "64", "all requests are done on both sides"
    assert found[4] == found[9], "with the same answers"


def test_the_administrators_key_opens_what_is_the_operators(page: Page) -> None:
    page.turn(6)
    page.click("main button", "Enter keys")
    page.fill("dialog.keys .field:nth-of-type(2) input", "owner")
    page.click("dialog.keys button", "Use them")
    page.until("document.querySelector('main').innerText.includes('Requests board by')")
    assert page.run("Object.keys(localStorage).join() + document.cookie") == "ropeway.theme", "no key outlives its tab"


def test_a_key_is_made_and_revoked(browser: Browser, tmp_path: Path) -> None:
    with showing(StubFeed(Batch()), admin_key="owner", data_dir=str(tmp_path)) as server:
        page = browser.page(f"{server.url}/ui/#keys")
        page.run("sessionStorage.setItem('ropeway.admin', 'owner')")
        page.turn(5)
        page.click("main button", "New key")
        page.fill("dialog input[type=text]", "alice")
        page.click("dialog button", "Make it")
        key = page.until("document.querySelector('#new-key')?.innerText")
        found = httpx2.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=60)
        assert found.status_code == 200
        page.press("Escape")
        page.until("!document.querySelector('#new-key')")
        page.until("document.querySelector('main').innerText.includes('Nobody comes in without a key')")
        assert key not in page.run("document.documentElement.outerHTML"), "shown once"
        page.click("main button.danger", "Revoke")
        page.click("dialog.ask button.danger", "Revoke")
        page.until("document.querySelector('.state.revoked')")
        page.close()
    assert page.problems == []


def test_away_and_back(browser: Browser) -> None:
    with showing(StubFeed(Batch())) as first:
        page = browser.page(f"{first.url}/ui/")
        page.until(DRAWN)
    page.until("document.querySelector('.away').innerText.includes('away')")
    assert page.run("document.querySelector('#server').dataset.state") == "away"
    again = StubFeed(Batch(seed=2))
    with showing(again, port=first.port):
        page.until("document.querySelector('#server').dataset.state === 'live'", 40)
        assert page.run("document.querySelector('.away').hidden")
        assert again.readers == 1
        page.close()
    assert page.problems == []


def test_the_policy_holds(browser: Browser, server: Server) -> None:
    page = browser.page(f"{server.url}/ui/")
    page.until(DRAWN)
    found = page.run(
        """(async () => {
            const broken = new Set();
            const wanted = ["connect-src", "img-src", "require-trusted-types-for", "style-src-elem", "style-src-attr"];
            const missing = () => wanted.filter((directive) => !broken.has(directive));
            addEventListener("securitypolicyviolation", (event) => broken.add(event.effectiveDirective));
            const attempts = [
                () => { document.body.innerHTML = "<b>x</b>"; },
                () => fetch("http://127.0.0.1:9/", {mode: "no-cors"}),
                () => { new Image().src = "data:image/gif;base64,R0lGODlhAQABAAAAACw="; },
                () => eval("window.ran = true"),
                () => document.head.append(Object.assign(document.createElement("style"), {textContent: "body {}"})),
                () => document.body.setAttribute("style", "display: none"),
            ];
            for (const attempt of attempts) try { await attempt(); } catch { /* as it should be */ }
            for (let n = 0; missing().length && n < 300; n++) await new Promise((done) => setTimeout(done, 100));
            return [missing(), window.ran ? "ran" : "not run", getComputedStyle(document.body).display];
        })()"""
    )
    page.close()
    assert found == [[], "not run", "block"]


@pytest.mark.parametrize("width", [360, 800])
def test_small_screens_show_all_of_it(page: Page, width: int) -> None:
    page.resize(width, 740)
    page.until(DRAWN)
    for number, name in enumerate(TABS, 1):
        page.turn(number)
        page.until("document.querySelector('main').innerText.length > 60")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), name


def test_who_wants_no_motion_sees_none(browser: Browser, server: Server) -> None:
    page = browser.page()
    page.media(prefers_reduced_motion="reduce", prefers_color_scheme="dark")
    page.open(f"{server.url}/ui/")
    page.until(DRAWN)
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.run(ground)
    page.press("d")
    page.until(f"document.documentElement.dataset.theme === 'light' && {ground} !== {json.dumps(dark)}")
    page.turn(3)
    page.until("document.querySelector('#totals')?.innerText.includes('better by')", 60)
    assert page.run("document.querySelector('.compare .row.card button').innerText") == "Play", "nothing has begun"
    page.close()
    assert page.problems == []
