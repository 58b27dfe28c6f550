"""The outbox alone: every event comes to one end, whatever receivers and crashes do, and hosts have their turns."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import formatdate
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.jobs import outbox
from ropeway.jobs.egress import Answer
from ropeway.jobs.webhooks import KEPT, LEASE, MAX_RETRY_AFTER, SCHEDULE, next_delay, retry_after, settle


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with tables() as found:
        yield found


@contextmanager
def tables() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        for step in outbox.SCHEMA.steps:
            connection.executescript(step)
        yield connection


def add(connection: sqlite3.Connection, url: str, now: float = 0.0) -> None:
    outbox.add(connection, type="job.completed", subject="job_1", url=url, tenant="t", created=now)


def claim(connection: sqlite3.Connection, now: float, **kwargs: Any) -> list[outbox.Delivery]:
    return turn(connection, now, **kwargs)[0]


def turn(connection: sqlite3.Connection, now: float, **kwargs: Any) -> tuple[list[outbox.Delivery], str]:
    return outbox.claim(connection, now=now, lease=LEASE, **{"most": 64, "each": 4, "busy": {}, **kwargs})


def fail(connection: sqlite3.Connection, delivery: outbox.Delivery, now: float, **kwargs: Any) -> None:
    outbox.failed(connection, delivery, now=now, status=500, error="HTTP 500", **{"due": now + 5, **kwargs})


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4))
def test_every_event_comes_to_one_end(seed: int, events: int, hosts: int) -> None:
    with tables() as connection:
        check_ends(connection, random.Random(seed), events, hosts)


def check_ends(connection: sqlite3.Connection, draw: random.Random, events: int, hosts: int) -> None:
    """Against a model of what the receivers saw and said."""
    now = 0.0
    for n in range(events):
        add(connection, f"https://host{n % hosts}.example/hook")
    said: dict[str, list[int | None]] = defaultdict(list)
    bodies: dict[str, bytes] = {}
    earliest: dict[str, float] = {}
    crashes: Counter[str] = Counter()
    gone: set[str] = set()
    while (due := outbox.next_due(connection)) is not None:
        now = max(now, due)
        for delivery in claim(connection, now):
            assert now >= earliest.get(delivery.event, 0.0)
            assert delivery.body == bodies.setdefault(delivery.event, delivery.body)
            assert delivery.attempt == len(said[delivery.event]) + crashes[delivery.event] + 1
            if draw.random() < 0.2:
                crashes[delivery.event] += 1
                earliest[delivery.event] = now + LEASE
                continue
            answer = Answer(draw.choice([200, 204, 302, 400, 410, 429, 500, 500, 500, None]), draw.choice(["", "900"]))
            said[delivery.event].append(answer.status)
            settle(connection, delivery, answer, now=now, draw=draw.random())
            earliest[delivery.event] = now + max(5.0, float(answer.retry_after or 0))
            if answer.status == 410:
                gone.add(delivery.url)
    ended = outbox.listing(connection, limit=1000)
    assert len(ended) == events
    for entry in ended:
        seen = said[entry.event]
        assert entry.ended is not None
        assert not {200, 204} & set(seen[:-1]), "sent again after it was delivered"
        if entry.state == "delivered":
            assert seen[-1] in (200, 204)
        else:
            assert len(seen) + crashes[entry.event] >= len(SCHEDULE) or entry.url in gone


def test_an_event_is_openais(connection: sqlite3.Connection) -> None:
    outbox.add(connection, type="batch.failed", subject="batch_7", url="https://a.example/x", tenant="t", created=12.9)
    [delivery] = claim(connection, 12.9)
    body = msgspec.json.decode(delivery.body)
    assert body == {
        "id": delivery.event, "object": "event", "created_at": 12, "type": "batch.failed", "data": {"id": "batch_7"},
    }  # fmt: skip
    assert delivery.event.startswith("evt_")
    assert "." not in delivery.event, "the signature joins id and time by a full stop"


def test_an_event_belongs_to_the_transaction_it_tells_of(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN")
    add(connection, "https://a.example/")
    connection.execute("ROLLBACK")
    assert outbox.next_due(connection) is None


def test_a_late_word_about_an_old_attempt_is_not_believed(connection: sqlite3.Connection) -> None:
    add(connection, "https://a.example/")
    [first] = claim(connection, 0.0)
    assert claim(connection, LEASE - 1) == []
    [second] = claim(connection, LEASE)
    assert (second.event, second.body, second.attempt) == (first.event, first.body, 2)
    fail(connection, first, LEASE + 1, due=None)
    [entry] = outbox.listing(connection, limit=1)
    assert (entry.state, entry.error) == ("pending", None)
    outbox.delivered(connection, second, now=LEASE + 2, status=200)
    fail(connection, second, LEASE + 3)
    [entry] = outbox.listing(connection, limit=1)
    assert (entry.state, entry.status) == ("delivered", 200)


def test_no_host_gets_more_than_its_share_and_each_has_its_turn(connection: sqlite3.Connection) -> None:
    for host in "abcdefgh":
        for _ in range(50):
            add(connection, f"https://{host}.example/")
    served: Counter[str] = Counter()
    after = ""
    for _ in range(4):
        found, after = turn(connection, 0.0, most=4, each=2, after=after)
        assert max(Counter(one.host for one in found).values()) <= 2
        served.update(one.host for one in found)
    assert served == {f"{host}.example": 2 for host in "abcdefgh"}
    busy = {"a.example": 4, "b.example": 3}
    more = Counter(one.host for one in claim(connection, 0.0, busy=busy))
    assert (more["a.example"], more["b.example"], more["c.example"]) == (0, 1, 4)


def test_a_claim_looks_at_so_many_hosts_and_goes_on_behind_them(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_HOSTS", 3)
    hosts = [f"{letter}.example" for letter in "abcdefg"]
    for host in hosts:
        add(connection, f"https://{host}/", now=0.0 if host in ("b.example", "g.example") else 9.0)
    found, after = [], ""
    for _ in range(3):
        claimed, after = turn(connection, 0.0, after=after)
        found += [one.host for one in claimed]
    assert found == ["b.example", "g.example"]
    assert after == "c.example", "behind the last one it goes on with the first"


def test_a_receiver_that_asks_for_quiet_gets_it_for_all_events_of_its_url(connection: sqlite3.Connection) -> None:
    for url in ("https://a.example/x", "https://a.example/x", "https://a.example/y"):
        add(connection, url)
    [one] = claim(connection, 0.0, most=1)
    fail(connection, one, 0.0, quiet_until=100.0)
    assert [delivery.url for delivery in claim(connection, 99.0)] == ["https://a.example/y"]
    assert [delivery.attempt for delivery in claim(connection, 100.0)] == [2, 1]


def test_410_ends_what_is_owed_to_the_url_until_somebody_tries_again(connection: sqlite3.Connection) -> None:
    for _ in range(3):
        add(connection, "https://a.example/x")
    add(connection, "https://a.example/y")
    [first] = claim(connection, 0.0, most=1)
    outbox.gone(connection, first, now=1.0)
    add(connection, "https://a.example/x", now=2.0)
    states = Counter((entry.url[-1], entry.state, entry.status) for entry in outbox.listing(connection, limit=9))
    assert states == {("x", "failed", 410): 4, ("y", "pending", None): 1}
    assert outbox.retry(connection, event=first.event, now=3.0) == 1
    add(connection, "https://a.example/x", now=4.0)
    assert sorted(delivery.url[-1] for delivery in claim(connection, 4.0)) == ["x", "x", "y"]
    assert outbox.retry(connection, event=None, now=5.0) == 3
    assert outbox.retry(connection, event="evt_unknown", now=5.0) == 0


def test_what_ended_long_ago_is_forgotten(connection: sqlite3.Connection) -> None:
    for n in range(3):
        add(connection, f"https://{n}.example/")
    for n, delivery in enumerate(claim(connection, 0.0)[:2]):
        outbox.delivered(connection, delivery, now=float(n), status=200)
    assert outbox.prune(connection, before=1.0) == 1
    assert {entry.url for entry in outbox.listing(connection, limit=9)} == {"https://1.example/", "https://2.example/"}
    assert sum(SCHEDULE) * 2 < KEPT, "an event must not be forgotten while it is owed"


@given(st.integers(1, 12), st.floats(0, 1e9), st.floats(0, 1, exclude_max=True))
def test_the_next_attempt_is_never_early(attempt: int, asked: float, draw: float) -> None:
    delay = next_delay(attempt, asked, draw)
    if attempt >= len(SCHEDULE):
        assert delay is None
    else:
        assert delay is not None
        least = max(SCHEDULE[attempt], min(asked, MAX_RETRY_AFTER))
        assert least <= delay <= max(SCHEDULE[attempt] * 1.1, least)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0), ("7", 7), (" 120 ", 120), ("-5", 0), ("soon", 0), ("9" * 400, 999999999999), ("1e3", 0)],
)
def test_retry_after_in_seconds(header: str, seconds: float) -> None:
    assert retry_after(header, 1000.0) == seconds


def test_retry_after_as_a_date() -> None:
    assert retry_after(formatdate(1_700_000_090, usegmt=True), 1_700_000_000.0) == 90
    assert retry_after(formatdate(1_699_999_000, usegmt=True), 1_700_000_000.0) == 0
