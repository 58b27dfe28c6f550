"""Deliveries to real receivers on a virtual clock: the times of attempts, what a receiver may do, crashes, secrets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

import openai
import pytest

from ropeway.config.jobs import JobsConfig
from ropeway.errors import ConfigError, StorageError
from ropeway.jobs import outbox
from ropeway.jobs.egress import Egress
from ropeway.jobs.signing import Keyring, new_secret, signature
from ropeway.jobs.webhooks import JITTER, LEASE, SCHEDULE, Dispatcher
from waiting import eventually
from webhookkit import (
    LOOPBACK,
    SECRET,
    Act,
    Receiver,
    Wall,
    dispatcher,
    endless_head,
    entries,
    garbage,
    hang,
    owe,
    receiving,
    reset,
    slow_body,
    slow_head,
    status,
    storing,
    ten_gigabytes,
    to_the_end,
)

CLIENT = openai.OpenAI(api_key="unused", webhook_secret=SECRET)


@pytest.mark.parametrize("draw", [0.0, 1.0])
async def test_the_schedule_is_that_of_the_specification(tmp_path: Path, draw: float) -> None:
    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(status(500)) as receiver:
            await owe(store, receiver.url())
            begun = wall.now
            await to_the_end(store, dispatcher(store, draw=draw), wall)
            times = [int(hit.headers["webhook-timestamp"]) - begun for hit in receiver.hits]
        assert times == [int(at) for at in accumulate(delay * (1 + JITTER * draw) for delay in SCHEDULE)]
        [entry] = await entries(store)
        assert (entry.state, entry.status, entry.attempts) == ("failed", 500, 10)
        assert len({(hit.headers["webhook-id"], hit.body) for hit in receiver.hits}) == 1


@pytest.mark.parametrize(
    ("act", "seconds", "said"),
    [
        (status(429, retry_after="700"), 700, "429"),
        (status(503, retry_after="1"), 5, "503"),
        (status(302, location="http://127.0.0.1:9/"), 5, "302"),
        (status(100), 5, "RemoteProtocolError"),
        (hang, 5, "No answer within"),
        (slow_head, 5, "No answer within"),
        (endless_head, 5, "RemoteProtocolError"),
        (reset, 5, "ReadError"),
        (garbage, 5, "RemoteProtocolError"),
    ],
    ids=["429", "503", "302", "100", "hang", "slow head", "endless head", "reset", "garbage"],
)
async def test_a_receiver_that_fails_is_asked_again(tmp_path: Path, act: Act, seconds: float, said: str) -> None:
    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(act, status(200)) as receiver:
            await owe(store, receiver.url())
            sender = dispatcher(store, Egress(LOOPBACK, timeout=4.0 if act in (hang, slow_head) else 30.0))
            await sender.dispatch()
            await sender.idle()
            [entry] = await entries(store)
            assert said in f"{entry.status} {entry.error}"
            assert (entry.state, entry.due) == ("pending", wall.now + seconds)
            await to_the_end(store, sender, wall)
            first, second = receiver.hits
        [family] = sender.families()
        assert {sample.labels["outcome"]: sample.value for sample in family.samples} == {"delivered": 1, "failed": 1}
        [entry] = await entries(store)
        assert (entry.state, entry.status, entry.error, entry.attempts) == ("delivered", 200, None, 2)
        assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
        assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]


@pytest.mark.parametrize("act", [slow_body, ten_gigabytes], ids=["slow body", "10 GB"])
async def test_what_follows_the_status_of_an_answer_does_not_matter(tmp_path: Path, act: Act) -> None:
    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(act) as receiver:
            await owe(store, receiver.url())
            sender = dispatcher(store, Egress(LOOPBACK, timeout=4.0 if act is slow_body else 30.0))
            await sender.dispatch()
            await sender.idle()
            assert receiver.written < 32 * 2**20, "buffers of the kernel, and not 10 GB"
        [entry] = await entries(store)
        assert (entry.state, entry.status) == ("delivered", 200)


async def test_tls_is_not_given_up_for_a_receiver_that_has_none(tmp_path: Path) -> None:
    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(status(200)) as receiver:
            await owe(store, receiver.url(scheme="https"))
            sender = dispatcher(store, Egress(LOOPBACK, timeout=0.5))
            await sender.dispatch()
            await sender.idle()
            assert receiver.hits == []
            await eventually(lambda: receiver.open_now == 0)
        [entry] = await entries(store)
        assert entry.state == "pending"
        assert entry.error


async def test_410_disables_the_url(tmp_path: Path) -> None:
    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(status(410), status(200)) as receiver:
            for _ in range(3):
                await owe(store, receiver.url())
            await owe(store, receiver.url("/other"))
            sender = dispatcher(store, each=1)
            await to_the_end(store, sender, wall)
            assert [hit.line.split()[1] for hit in receiver.hits] == ["/hook", "/other"]
            await owe(store, receiver.url())
            states = [entry.state for entry in await entries(store)]
            assert states == ["failed", "failed", "failed", "delivered", "failed"]
            assert await store.write(lambda c: outbox.retry(c, event=None, now=wall.now)) == 4
            await to_the_end(store, sender, wall)
            assert len(receiver.hits) == 6


async def test_a_slow_receiver_is_late_for_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropeway.jobs.webhooks._GRACE", 0.0)
    with storing(tmp_path, time.time) as store:
        async with receiving(hang) as slow, receiving(status(200)) as quick:
            for _ in range(50):
                await owe(store, slow.url())
            for _ in range(20):
                await owe(store, quick.url())
            running = asyncio.create_task(dispatcher(store, Egress(LOOPBACK, timeout=60.0)).run())
            async with asyncio.timeout(20):
                await slow.until(4)
                await quick.until(20)
            assert slow.most_open == 4
            assert quick.most_open <= 4
            await eventually(
                lambda: entries(store), lambda found: sum(entry.state == "delivered" for entry in found) == 20
            )
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        ends = Counter((entry.url, entry.state) for entry in await entries(store))
        assert ends == {(slow.url(), "pending"): 50, (quick.url(), "delivered"): 20}


CHILD = """
import asyncio, sys, time
from pathlib import Path
from webhookkit import LOOPBACK, storing
from ropeway.jobs.egress import Egress
from ropeway.jobs.webhooks import Dispatcher

async def main(folder, ahead):
    with storing(Path(folder), lambda: time.time() + ahead) as store:
        await Dispatcher(store, Egress(LOOPBACK), lambda: [sys.argv[3]]).run()

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


def child(folder: Path, ahead: float, failpoint: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ROPEWAY_FAILPOINT": failpoint}
    return subprocess.Popen([sys.executable, "-c", CHILD, folder, str(ahead), SECRET], env=environment)


async def test_a_crash_between_delivery_and_record_repeats_the_event_with_the_same_id(tmp_path: Path) -> None:
    """A process that really dies, by SIGKILL, after the receiver's 200 and before the commit; then another one."""
    async with receiving(status(200)) as receiver:
        with storing(tmp_path, time.time) as store:
            await owe(store, receiver.url())
        killed = child(tmp_path, 0.0, "webhook:kill")
        try:
            assert await asyncio.to_thread(killed.wait, 30) == -signal.SIGKILL
        finally:
            killed.kill()
        assert len(receiver.hits) == 1
        with storing(tmp_path, time.time) as store:
            [entry] = await entries(store)
            assert (entry.state, entry.attempts) == ("pending", 1)
            second = child(tmp_path, LEASE + 1, "")
            try:
                await eventually(lambda: entries(store), lambda found: found[0].state == "delivered", pause=0.02)
            finally:
                second.terminate()
                await asyncio.to_thread(second.wait, 30)
        first, again = receiver.hits
        assert first.headers["webhook-id"] == again.headers["webhook-id"]
        assert first.body == again.body
        assert int(again.headers["webhook-timestamp"]) >= int(first.headers["webhook-timestamp"]) + LEASE
        assert first.headers["webhook-signature"] != again.headers["webhook-signature"]
        CLIENT.webhooks.unwrap(again.body, again.headers)


async def test_openais_client_verifies_events_also_while_secrets_change(tmp_path: Path) -> None:
    old, new, strange = SECRET, new_secret(), new_secret()
    with storing(tmp_path, time.time) as store:
        async with receiving(status(200)) as receiver:
            await owe(store, receiver.url(), type="batch.completed", subject="batch_9")
            sender = Dispatcher(store, Egress(LOOPBACK), lambda: [new, old])
            await sender.dispatch()
            await sender.idle()
            [hit] = receiver.hits
    for secret in (old, new):
        event = CLIENT.webhooks.unwrap(hit.body, hit.headers, secret=secret)
        assert (event.type, event.data.id, event.id) == ("batch.completed", "batch_9", hit.headers["webhook-id"])
    wrong = [
        (hit.body, hit.headers, strange),
        (hit.body.replace(b"batch_9", b"batch_8"), hit.headers, old),
        (hit.body, {**hit.headers, "webhook-id": "evt_0"}, old),
    ]
    stale = str(int(time.time()) - 400)
    signed = signature([old], hit.headers["webhook-id"], int(stale), hit.body)
    wrong.append((hit.body, {**hit.headers, "webhook-timestamp": stale, "webhook-signature": signed}, old))
    for body, headers, secret in wrong:
        with pytest.raises(openai.InvalidWebhookSignatureError):
            CLIENT.webhooks.unwrap(body, headers, secret=secret)


@pytest.mark.parametrize("error", [ConfigError("no secret"), StorageError("no space")])
async def test_without_secrets_events_wait_and_no_attempt_is_lost(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    asked, broken = asyncio.Event(), True

    def keys() -> list[str]:
        asked.set()
        if broken:
            raise error
        return [SECRET]

    with storing(tmp_path, time.time) as store:
        async with receiving(status(200)) as receiver:
            await owe(store, receiver.url())
            running = asyncio.create_task(Dispatcher(store, Egress(LOOPBACK), keys).run())
            async with asyncio.timeout(20):
                await asked.wait()
                broken = False
                store.ended.tell()
                await receiver.until(1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        [entry] = await entries(store)
        assert (entry.state, entry.attempts) == ("delivered", 1)
        assert str(error) in caplog.text


async def test_an_attempt_that_the_disk_does_not_take_is_repeated_with_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(work: object) -> None:
        raise StorageError("The disk is full.")

    async def delivered(_: Receiver, writer: asyncio.StreamWriter) -> None:
        monkeypatch.setattr(store, "write", full)
        await status(200)(_, writer)

    wall = Wall()
    with storing(tmp_path, wall) as store:
        async with receiving(delivered, status(200)) as receiver:
            await owe(store, receiver.url())
            sender, write = dispatcher(store), store.write
            await sender.dispatch()
            await sender.idle()
            monkeypatch.setattr(store, "write", write)
            assert "was not written down: The disk is full." in caplog.text
            await sender.dispatch()
            assert len(receiver.hits) == 1, "the lease of the attempt is not over"
            wall.now += LEASE + 1
            await sender.dispatch()
            await sender.idle()
            first, second = receiver.hits
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        [entry] = await entries(store)
        assert (entry.state, entry.status) == ("delivered", 200)


def test_an_empty_file_of_secrets_is_no_reason_to_sign_with_none(tmp_path: Path) -> None:
    keyring = Keyring(JobsConfig(data_dir=str(tmp_path)))
    made = keyring.secrets()
    assert (len(made), keyring.secrets()) == (1, made)
    keyring.path.write_text("\n\n")
    with pytest.raises(ConfigError, match="is empty"):
        keyring.secrets()
    keyring.path.unlink()
    assert keyring.secrets() != made


async def test_a_server_on_which_nobody_defers_anything_makes_no_files(tmp_path: Path) -> None:
    with storing(tmp_path / "data", time.time) as store:
        await dispatcher(store).dispatch()
    assert not (tmp_path / "data").exists()
