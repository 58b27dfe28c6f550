"""The worker: what it tries again and when, what it gives back, and what it does while its queue is in trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from ropeway.errors import StorageError
from ropeway.jobs.pace import Pace
from ropeway.jobs.work import Call, Reply, Work
from ropeway.jobs.worker import Worker

OK = Reply(status=200, body=b"{}")
SPENT = b'{"error": {"message": "m", "type": "insufficient_quota", "code": "insufficient_quota"}}'


class Queue:
    """A queue in memory that writes down what it is told. `broken` is what it raises, so long as it is set."""

    def __init__(self, *numbers: int) -> None:
        self.waiting = [self.work(number) for number in numbers]
        self.finished: list[tuple[int, int]] = []
        self.released: list[tuple[int, float]] = []
        self.dropped: list[int] = []
        self.extended: list[list[int]] = []
        self.gone: set[int] = set()
        self.broken: Exception | None = None
        self.tried = 0
        self.closed = False
        self.news = asyncio.Event()

    @staticmethod
    def work(number: int, attempt: int = 1) -> Work:
        return Work(owner="o", item=number, attempt=attempt, call=Call(url="/", body=str(number).encode()))

    def check(self) -> None:
        self.tried += 1
        if self.broken is not None:
            raise self.broken

    async def lease(self, most: int, *, wait: float) -> list[Work]:
        self.check()
        while not self.waiting:
            self.news.clear()
            await self.news.wait()
        found, self.waiting = self.waiting[:most], self.waiting[most:]
        return found

    async def extend(self, held: Sequence[Work]) -> list[Work]:
        self.check()
        self.extended.append([work.item for work in held])
        return [work for work in held if work.item in self.gone]

    async def finish(self, work: Work, reply: Reply) -> bool:
        self.check()
        self.finished.append((work.item, reply.status))
        return work.item not in self.gone

    async def release(self, work: Work, *, delay: float = 0.0) -> None:
        self.check()
        self.released.append((work.item, delay))
        if delay:
            self.waiting.append(self.work(work.item, work.attempt + 1))
            self.news.set()

    def drop(self, work: Work) -> None:
        self.dropped.append(work.item)

    async def close(self) -> None:
        self.closed = True


async def calm() -> None:
    """Let everything happen that can happen without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


class Sleeps:
    """Time that passes when a test says so: sleeps of up to `most` seconds at once end, longer ones never do."""

    def __init__(self, most: float = 5.0) -> None:
        self.most = most
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        if seconds > self.most:
            await asyncio.Event().wait()
        await asyncio.sleep(0)


def worker(queue: Queue, caller: object, *, concurrency: int = 4, most: float = 5.0, beat_s: float = 10.0) -> Worker:
    return Worker(
        queue, caller, concurrency=concurrency, pace=Pace(lambda: 0.0), beat_s=beat_s, sleep=Sleeps(most),  # type: ignore[arg-type]
        pick=lambda: 0.5,
    )  # fmt: skip


def answering(*replies: Reply) -> object:
    """Answers every item by these replies in turn, the last one for ever."""
    calls: dict[bytes, int] = {}

    async def caller(call: Call) -> Reply:
        number = calls[call.body] = calls.get(call.body, -1) + 1
        return replies[min(number, len(replies) - 1)]

    return caller


async def test_never_more_in_flight_than_allowed() -> None:
    queue = Queue(*range(20))
    running = most = 0

    async def caller(call: Call) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return OK

    one = worker(queue, caller, concurrency=3)
    one.start()
    await calm()
    await calm()
    assert sorted(queue.finished) == [(n, 200) for n in range(20)]
    assert (most, one.answered, one.running) == (3, 20, 0)
    await one.stop()


@pytest.mark.parametrize("status", [200, 201, 400, 401, 404, 413, 422])
async def test_an_answer_is_an_answer(status: int) -> None:
    queue = Queue(1)
    one = worker(queue, answering(Reply(status=status, body=b"{}")))
    one.start()
    await calm()
    assert (queue.finished, queue.released) == ([(1, status)], [])
    await one.stop()


@pytest.mark.parametrize(("status", "body"), [(429, b"{}"), (503, b"{}"), (503, SPENT[:9]), (429, b"<html>")])
async def test_who_is_busy_is_asked_again_and_again_ever_later(status: int, body: bytes) -> None:
    queue = Queue(1)
    one = worker(queue, answering(*[Reply(status=status, body=body)] * 8, OK))
    one.start()
    await calm()
    await calm()
    assert [delay for _, delay in queue.released] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert (queue.finished, one.retried) == ([(1, 200)], 8)
    await one.stop()


async def test_nobody_comes_back_before_the_server_says() -> None:
    queue = Queue(1)
    one = worker(queue, answering(Reply(status=503, body=b"{}", retry_after=33.0), OK))
    one.start()
    await calm()
    assert queue.released == [(1, 33.0)]
    await one.stop()


async def test_a_key_that_has_spent_all_is_not_tried_again() -> None:
    queue = Queue(1)
    one = worker(queue, answering(Reply(status=429, body=SPENT, retry_after=86400.0)))
    one.start()
    await calm()
    assert (queue.finished, queue.released) == ([(1, 429)], [])
    await one.stop()


@pytest.mark.parametrize("status", [500, 502, 504])
async def test_what_fails_again_and_again_ends_with_its_error(status: int) -> None:
    queue = Queue(1)
    busy = Reply(status=503, body=b"{}")
    one = worker(queue, answering(busy, busy, busy, busy, busy, Reply(status=status, body=b"{}")))
    one.start()
    await calm()
    await calm()
    assert len(queue.released) == 5 + 3
    assert queue.finished == [(1, status)]
    await one.stop()


async def test_strangers_that_never_return_do_not_make_it_forget_how_often_an_item_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ropeway.jobs.worker._REMEMBERED", 2)
    one, failed = worker(Queue(), answering(OK)), Reply(status=500, body=b"{}")
    delays = [one._delay(Queue.work(item), failed) for item in (1, 2, 1, 3, 1, 4, 1)]
    assert [delay is None for delay in delays] == [False] * 6 + [True]
    assert len(one._tries) == 1


async def test_a_refused_item_keeps_its_seat_a_while() -> None:
    """Else a server that is busy would be asked for all the items in the line, one after the other."""
    queue = Queue(*range(50))
    one = worker(queue, answering(Reply(status=503, body=b"{}", retry_after=20.0)), concurrency=4, most=0.0)
    one.start()
    await calm()
    assert len(queue.released) == one.running == 4
    await one.stop()


async def test_stop_gives_everything_back_at_once() -> None:
    queue = Queue(*range(6))

    async def never(call: Call) -> Reply:
        await asyncio.Event().wait()
        return OK

    one = worker(queue, never, concurrency=4, most=0.0)
    one.start()
    await calm()
    assert one.running == 4
    await asyncio.wait_for(one.stop(), 5)
    assert sorted(queue.released) == [(n, 0.0) for n in range(4)]
    assert (queue.finished, queue.closed, one.running) == ([], True, 0)
    await one.stop()


async def test_what_has_been_lost_is_cut_off() -> None:
    queue = Queue(1, 2)
    cut: list[bytes] = []

    async def never(call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.append(call.body)
            raise
        return OK

    beats = asyncio.Event()

    async def sleep(seconds: float) -> None:
        await beats.wait()
        beats.clear()

    one = Worker(queue, never, concurrency=4, pace=Pace(lambda: 0.0), sleep=sleep)  # type: ignore[arg-type]
    one.start()
    await calm()
    queue.gone.add(2)
    beats.set()
    await calm()
    assert queue.extended == [[1, 2]]
    assert (cut, one.lost, one.running) == ([b"2"], 1, 1)
    await one.stop()
    assert queue.released == [(1, 0.0)]


async def test_what_was_given_back_is_not_lost() -> None:
    """It keeps its seat a while, in which a heartbeat may come."""
    queue, beat, rest = Queue(1), asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        await (beat if seconds == 10.0 else rest).wait()
        beat.clear()

    one = Worker(
        queue, answering(Reply(status=503, body=b"{}", retry_after=20.0)), concurrency=1, pace=Pace(lambda: 0.0),  # type: ignore[arg-type]
        beat_s=10.0, sleep=sleep,
    )  # fmt: skip
    one.start()
    await calm()
    queue.gone.add(1)  # nobody has a lease of it
    beat.set()
    await calm()
    assert (len(queue.released), queue.extended, one.lost, one.running) == (1, [], 0, 1)
    await one.stop()
    assert len(queue.released) == 1


async def test_what_is_being_committed_is_not_cut_off() -> None:
    """Its row has ended, and that is its own doing."""
    queue, beat, committed = Queue(1), asyncio.Event(), asyncio.Event()

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(queue, name)

        async def finish(self, work: Work, reply: Reply) -> bool:
            await committed.wait()
            return await queue.finish(work, reply)

    async def sleep(seconds: float) -> None:
        await beat.wait()
        beat.clear()

    one = Worker(Slow(), answering(OK), concurrency=1, pace=Pace(lambda: 0.0), sleep=sleep)  # type: ignore[arg-type]
    one.start()
    await calm()
    queue.gone.add(1)
    beat.set()
    await calm()
    assert (queue.extended, one.running) == ([[1]], 1)
    queue.gone.clear()
    committed.set()
    await calm()
    assert (queue.finished, one.answered, one.lost) == ([(1, 200)], 1, 0)
    await one.stop()


async def test_an_answer_waits_for_its_queue(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk or a queue that is away costs no answer, and is said once."""
    queue = Queue(1)
    answered = asyncio.Event()

    async def caller(call: Call) -> Reply:
        await answered.wait()
        return OK

    one = worker(queue, caller)
    one.start()
    await calm()
    queue.broken = StorageError("The disk is full.")
    answered.set()
    await calm()
    assert queue.tried > 5
    assert queue.finished == []
    queue.broken = None
    await calm()
    assert queue.finished == [(1, 200)]
    assert [record.message for record in caplog.records].count("Background work waits: The disk is full.") == 1
    await one.stop()


async def test_a_heartbeat_that_fails_costs_nothing_but_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ropeway.jobs")
    queue, answered, beat = Queue(1), asyncio.Event(), asyncio.Event()

    async def caller(call: Call) -> Reply:
        await answered.wait()
        return OK

    async def sleep(seconds: float) -> None:
        await beat.wait()
        beat.clear()

    one = Worker(queue, caller, concurrency=1, pace=Pace(lambda: 0.0), sleep=sleep)  # type: ignore[arg-type]
    one.start()
    await calm()
    queue.broken = ZeroDivisionError("a fault")
    for _ in range(3):
        beat.set()
        await calm()
    queue.broken = None
    beat.set()
    await calm()
    assert (queue.extended, one.running, one.lost) == ([[1]], 1, 0)
    answered.set()
    await calm()
    assert queue.finished == [(1, 200)]
    said = [record.message for record in caplog.records]
    assert said == ["Background work waits: a fault", "Background work goes on."]
    await one.stop()


async def test_a_queue_that_raises_anything_does_not_end_the_worker() -> None:
    queue = Queue(1)
    queue.broken = ZeroDivisionError("a fault")
    one = worker(queue, answering(OK))
    one.start()
    await calm()
    queue.broken = None
    await calm()
    assert queue.finished == [(1, 200)]
    await one.stop()


async def test_a_caller_that_raises_leaves_its_item_to_its_lease(caplog: pytest.LogCaptureFixture) -> None:
    queue = Queue(1, 2)

    async def caller(call: Call) -> Reply:
        if call.body == b"1":
            raise ZeroDivisionError("a fault")
        return OK

    one = worker(queue, caller)
    one.start()
    await calm()
    assert (queue.finished, queue.released, queue.dropped, one.running) == ([(2, 200)], [], [1], 0)
    assert "The item 1 was left" in caplog.text
    await one.stop()
