"""The connection to Redis: how it is named, how long it waits, and that whoever asks can be cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from redisserver import RedisServer, redis_running
from ropeway.errors import ConfigError
from ropeway.jobs.redis_broker import Broker, check
from ropeway.jobs.redis_link import Away, Link
from waiting import eventually


@asynccontextmanager
async def linked(server: RedisServer, **settings: float) -> AsyncIterator[Link]:
    """The link of a broker, with Redis there."""
    link = Broker(server.url, "ropeway", **settings).link
    running = asyncio.create_task(link.run())
    try:
        await eventually(lambda: link.up)
        yield link
    finally:
        running.cancel()
        await link.close()


async def test_a_question_can_be_cancelled_at_every_moment() -> None:
    with redis_running() as server:
        async with linked(server) as link:
            over = 0
            for moment in range(64):
                asking = asyncio.create_task(link.ask("BLPOP", f"nothing-{moment}", "0.002"))
                for _ in range(moment):
                    await asyncio.sleep(0)
                if asking.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await asking
                else:
                    over += 1
            assert over < 32, "it is over before it is cancelled"
            assert link.up


async def test_what_waits_for_news_has_their_time_and_that_of_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    with redis_running() as server:
        async with linked(server, answer_s=1.0) as link:
            await link.wait({"ropeway:calls:low": "0-0"}, 1.5)
            assert link.up, "it has waited for longer than an answer takes"
            server.freeze()
            with pytest.raises(Away):
                await link.ask("PING")
            assert "is away (TimeoutError: no answer within 1 s)" in caplog.text
            server.thaw()
            await eventually(lambda: link.up)


@contextmanager
def refused(*told: str) -> Iterator[None]:
    with pytest.raises(ConfigError) as error:
        yield
    assert all(part in error.value.message for part in told)
    assert "secret" not in error.value.message


def test_what_is_malformed_is_refused_without_its_password() -> None:
    pytest.importorskip("redis")
    for url in ("http://:secret@host", "redis://:secret@host:port", "host:6379", "", "unix://"):
        with refused("redis://"):
            check(url, "ropeway")
    for prefix in ("", "two words", "a" * 65, "caf\u00e9"):
        with refused("redis_prefix"):
            check("redis://:secret@host/0", prefix)


def test_without_its_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropeway.jobs.redis_broker.find_spec", lambda name: None)
    with refused("pip install 'ropeway[redis]'"):
        check("redis://:secret@host", "ropeway")


async def test_the_log_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("redis")
    caplog.set_level(logging.INFO, "ropeway.jobs")
    link = Broker("redis://user:secret@127.0.0.1:1/0", "ropeway").link
    running = asyncio.create_task(link.run())
    await asyncio.wait_for(link.tried.wait(), 10)
    running.cancel()
    await link.close()
    assert "127.0.0.1:1 is away" in caplog.text
    assert "secret" not in caplog.text
