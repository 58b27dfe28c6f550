"""The keeper: what it does by itself, what it goes on with after a crash, and what it does in trouble."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jobkit import again, answer_all, jsonl, lines_of, quick_folder, results, submit
from ropeway.errors import StorageError
from ropeway.jobs import inputs
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.records import Batch, BatchState, Usage
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Reply
from waiting import eventually


@pytest.fixture
async def store() -> AsyncIterator[JobStore]:
    with quick_folder() as folder:
        made = JobStore(folder / "data")
        yield made
        made.close()


async def until_is(store: JobStore, batch: Batch, state: BatchState) -> None:
    await eventually(lambda: again(store, batch), lambda found: found.status is state)


async def test_it_carries_batches_on_as_they_come(store: JobStore) -> None:
    keeper = Keeper(store)
    keeper.start()
    await asyncio.sleep(0)
    assert not store.exists
    first = await submit(store, jsonl(3))
    await until_is(store, first, BatchState.IN_PROGRESS)
    assert await eventually(lambda: answer_all(store)) == 3  # it may just be taken in
    await until_is(store, first, BatchState.COMPLETED)
    second = await submit(store, b"nonsense")
    await until_is(store, second, BatchState.FAILED)
    await keeper.stop()
    await keeper.stop()


class Cut(BaseException):
    """The process ends here."""


async def cut_off(monkeypatch: pytest.MonkeyPatch, store: JobStore, passage: int) -> None:
    """A round of which the `passage`-th failpoint is the last thing that happens."""
    count = 0

    def failpoint(name: str) -> None:
        nonlocal count
        count += 1
        if count == passage:
            raise Cut

    with monkeypatch.context() as patched:
        patched.setattr("ropeway.jobs.keeper.failpoint", failpoint)
        with pytest.raises(Cut):
            await Keeper(store).round()


@pytest.mark.parametrize("passage", [1, 2, 3])
async def test_taking_in_goes_on_where_it_was_cut_off(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, passage: int
) -> None:
    data = b"\n\n" + jsonl(2500).replace(b"\n", b"\r\n\n")
    batch = await submit(store, data)
    await cut_off(monkeypatch, store, passage)
    before = await store.batches.progress(batch)
    assert before.lines == min(1000 * passage, 2500)
    assert before.loaded < len(data) or before.lines == 2500
    await answer_all(store)
    state = BatchState.IN_PROGRESS if before.lines < 2500 else BatchState.FINALIZING
    assert (await again(store, batch)).status is state, "what has been taken in has ended, but that is not all"
    await Keeper(store).round()
    await answer_all(store)
    await Keeper(store).round()
    ended = await again(store, batch)
    assert ended.status is BatchState.COMPLETED
    assert len(results(store, ended)) == 2500


async def test_two_keepers_take_in_each_line_once(store: JobStore) -> None:
    other = JobStore(store.folder)
    batch = await submit(store, jsonl(3000))
    await asyncio.gather(*(keeper.round() for keeper in (Keeper(store), Keeper(other), Keeper(other))))
    for keeper in (Keeper(store), Keeper(other)):
        await keeper.round()
    await answer_all(store)
    await asyncio.gather(*(keeper.round() for keeper in (Keeper(store), Keeper(other), Keeper(other))))
    ended = await again(store, batch)
    assert ended.status is BatchState.COMPLETED
    assert len(results(store, ended)) == 3000
    other.close()


@pytest.mark.parametrize(("end", "code"), [("cancelled", "batch_cancelled"), ("expired", "batch_expired")])
async def test_a_batch_that_ends_while_it_is_taken_in_names_all_of_its_lines(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, end: str, code: str
) -> None:
    batch = await submit(store, jsonl(2500), window="1h")
    await cut_off(monkeypatch, store, 1)
    if end == "cancelled":
        await store.batches.cancel(batch.tenant, batch.id)
    else:
        monkeypatch.setattr(store, "clock", lambda: batch.expires_at + 1)
    await Keeper(store).round()
    await Keeper(store).round()
    ended = await again(store, batch)
    assert ended.status == end
    assert [line["error"]["code"] for line in lines_of(store, ended.error_file_id)] == [code] * 2500


async def test_an_input_that_vanished_fails_its_batch_alone(store: JobStore) -> None:
    broken, fine = await submit(store, jsonl(1)), await submit(store, jsonl(1))
    store.files.path(broken.input_file_id).unlink()
    await Keeper(store).round()
    found = await again(store, broken)
    assert (found.status, [error.code for error in found.errors or []]) == (BatchState.FAILED, ["input_file_not_found"])
    assert (await again(store, fine)).status is BatchState.IN_PROGRESS


async def test_files_that_cannot_be_written_are_written_later(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at the end of a batch costs nothing but time, and holds up no other batch."""
    stuck, other = await submit(store, jsonl(2, "stuck")), await submit(store, jsonl(2, "other"))
    await Keeper(store).round()
    await answer_all(store)
    real = store.files.draft
    tries = 0

    def full_at_first() -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise StorageError("The disk is full.")
        return real()

    monkeypatch.setattr(store.files, "draft", full_at_first)
    with pytest.raises(StorageError):
        await Keeper(store).round()
    assert [(await again(store, one)).status for one in (stuck, other)] == [BatchState.FINALIZING, BatchState.COMPLETED]
    await Keeper(store).round()
    assert len(results(store, await again(store, stuck))) == 2


async def test_trouble_is_said_once_and_what_it_held_up_goes_on(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ropeway.jobs.keeper._TROUBLE_SECONDS", 0.001)
    stuck = await submit(store, jsonl(2))
    path, tries = store.files.path(stuck.input_file_id), 0
    path.rename(kept := store.folder / "kept")
    path.symlink_to(path.parent)  # it cannot be read, and not because it has gone
    real = store.batches.todo

    async def counted() -> list[Batch]:
        nonlocal tries
        tries += 1
        return await real()

    monkeypatch.setattr(store.batches, "todo", counted)
    keeper = Keeper(store)
    keeper.start()
    await eventually(lambda: tries > 5)
    assert [record.message.split(":")[0] for record in caplog.records] == ["Batches wait"]
    kept.replace(path)  # at once: a file that is not there has gone
    await until_is(store, stuck, BatchState.IN_PROGRESS)
    await keeper.stop()


async def test_usage_of_another_shape_is_not_counted(store: JobStore) -> None:
    bodies = [
        {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}},
        {"usage": {"input_tokens": 5, "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 2}}},
        {"usage": {"prompt_tokens": "many"}},
        {"usage": None},
        ["no", "object"],
    ]
    batch = await submit(store, jsonl(len(bodies)))
    await Keeper(store).round()
    for work in await store.items.claim("w", 9):
        reply = Reply(status=200, body=json.dumps(bodies.pop()).encode(), request_id="r")
        assert await store.items.finish(work.item, work.attempt, reply)
    await Keeper(store).round()
    ended = await again(store, batch)
    assert (ended.status, ended.counts.completed) == (BatchState.COMPLETED, 5)
    assert ended.usage == Usage(input_tokens=8, output_tokens=6, cached_tokens=1, reasoning_tokens=2)


async def test_a_batch_is_checked_to_its_end_or_not_at_all(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends in the middle of a long input leaves it to the next one, and does not say that it is wrong."""
    batch, check = await submit(store, jsonl(3)), inputs.check
    loop, keeper = asyncio.get_running_loop(), Keeper(store)

    def slow(*args: Any, wanted: Any, **more: Any) -> Any:
        asyncio.run_coroutine_threadsafe(keeper.stop(), loop).result(10)
        return check(*args, wanted=wanted, **more)

    with monkeypatch.context() as patched:
        patched.setattr(inputs, "check", slow)
        await keeper.round()
    assert (await again(store, batch)).status is BatchState.VALIDATING
    await Keeper(store).round()
    assert (await again(store, batch)).status is BatchState.IN_PROGRESS


async def test_items_go_when_their_files_are_there(store: JobStore) -> None:
    batch = await submit(store, jsonl(4500))
    keeper = Keeper(store)
    await keeper.round()
    await answer_all(store)
    keeper.start()
    await until_is(store, batch, BatchState.COMPLETED)

    async def empty() -> bool:
        return await store.read(lambda c: c.execute("SELECT 1 FROM items").fetchone()) is None

    await eventually(empty)
    assert await store.read(lambda c: c.execute("SELECT count(*) FROM bodies").fetchone()[0]) == 0
    assert await store.read(lambda c: c.execute("SELECT count(*) FROM replies").fetchone()[0]) == 0
    assert len(results(store, await again(store, batch))) == 4500
    await keeper.stop()
