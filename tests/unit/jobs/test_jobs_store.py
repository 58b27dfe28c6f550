"""What clients ask of files, batches and deferred requests, and what they are told."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator

import pytest

from jobkit import (
    ENDPOINT,
    TENANT,
    Timed,
    again,
    answer_all,
    jsonl,
    lines_of,
    quick_folder,
    results,
    submit,
    upload,
)
from ropeway.contract import Urgency
from ropeway.errors import RequestError, StorageError
from ropeway.jobs.files import LOOK_SECONDS
from ropeway.jobs.items import LEASE_SECONDS, SILENT_LEASES
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.records import BatchState, Counts, ItemState, Usage, new_id
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply
from ropeway.store import Database


@pytest.fixture
async def store() -> AsyncIterator[Timed]:
    with quick_folder() as folder:
        made = Timed(folder / "data")
        yield made
        made.close()


def call(tenant: str = TENANT, urgency: Urgency = Urgency.LOW, body: bytes = b"{}") -> Call:
    return Call(url=ENDPOINT, body=body, tenant=tenant, urgency=urgency)


async def events(store: JobStore) -> list[tuple[str, str, str]]:
    return await store.read(
        lambda c: [(row["type"], row["subject"], row["url"]) for row in c.execute("SELECT * FROM outbox ORDER BY id")]
    )


def test_a_store_that_nobody_uses_makes_no_files() -> None:
    with quick_folder() as folder:
        store = JobStore(folder / "data")
        assert not store.exists
        store.close()
        assert not (folder / "data").exists()


# Files


async def test_files_are_their_tenants_alone(store: Timed) -> None:
    mine = await upload(store, b"mine", tenant="a")
    assert store.files.path(mine.id).read_bytes() == b"mine"
    assert (await store.files.get("a", mine.id), mine.bytes, mine.expires_at) == (mine, 4, store.now + 30 * 86400)
    assert await store.files.get("b", mine.id) is None
    assert not await store.files.delete("b", mine.id)
    assert (await store.files.list("b")).data == []
    with pytest.raises(RequestError):
        await store.files.list("b", after=mine.id)
    with pytest.raises(RequestError, match="no file"):
        await store.batches.create(tenant="b", endpoint=ENDPOINT, input_file_id=mine.id)
    assert await store.files.delete("a", mine.id)
    assert not store.files.path(mine.id).exists()
    assert not await store.files.delete("a", mine.id)


async def test_pages_go_on_where_the_last_one_ended(store: Timed) -> None:
    ids = [(await upload(store, b"x")).id for _ in range(7)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        found: list[str] = []
        more = True
        while more:
            page = await store.files.list(TENANT, limit=3, order=order, after=found[-1] if found else None)  # type: ignore[arg-type]
            found += [file.id for file in page.data]
            more = page.has_more
        assert found == expected
    assert (await store.files.list(TENANT, purpose="batch_output")).data == []


async def test_files_expire_and_orphans_go(store: Timed) -> None:
    short = await upload(store, b"x", expires_after=3600)
    kept = await upload(store, b"y")
    orphan = store.files.path(new_id("file-"))
    orphan.write_bytes(b"left by a crash")
    stranger = orphan.with_name("README")
    stranger.write_text("not ours")
    store.now += 3601
    assert await store.files.get(TENANT, short.id) is None
    assert await store.files.sweep() == kept.expires_at
    assert not store.files.path(short.id).exists()
    with store.files.draft() as draft:
        for uptime in (0.0, 1.0, LOOK_SECONDS - 1):
            assert await store.files.sweep_orphans(uptime) == 0, "these may be being written"
        draft.keep(new_id("file-"))
    assert await store.files.sweep_orphans(LOOK_SECONDS) == 1
    assert not orphan.exists()
    assert stranger.exists()
    assert store.files.path(kept.id).exists()


async def test_a_file_that_the_tables_do_not_take_leaves_nothing(store: Timed) -> None:
    kept = await upload(store, b"kept")
    store.full = True
    with pytest.raises(StorageError):
        await upload(store, b"not kept")
    store.full = False
    assert [path.name for path in (store.folder / "files").iterdir()] == [kept.id]
    assert [record.id for record in (await store.files.list(TENANT)).data] == [kept.id]


async def test_a_draft_that_is_not_kept_leaves_nothing(store: Timed) -> None:
    with store.files.draft() as draft:
        draft.write(b"x")
    assert list((store.folder / "files").iterdir()) == []


@pytest.mark.parametrize("name", ["../jobs.db", "file-../../x", "", "file-" + "0" * 31, "/etc/passwd"])
async def test_only_an_id_becomes_a_path(store: Timed, name: str) -> None:
    with pytest.raises(RequestError):
        store.files.path(name)
    assert await store.files.get(TENANT, name) is None


# Batches


async def test_a_batch_from_its_input_to_its_files(store: Timed) -> None:
    keeper = Keeper(store)
    batch = await submit(
        store, jsonl(5), metadata={"a": "é"}, callback_url="https://a.example/x", output_expires_after=3600
    )
    assert (batch.status, batch.counts, batch.metadata) == (BatchState.VALIDATING, Counts(), {"a": "é"})
    assert await store.items.claim("w", 10) == []
    await keeper.round()
    batch = await again(store, batch)
    assert (batch.status, batch.counts, batch.model) == (BatchState.IN_PROGRESS, Counts(5, 0, 0), "m")

    works = await store.items.claim("w", 10)
    assert [work.call.urgency for work in works] == [Urgency.LOW] * 5
    body = b'{"usage": {"prompt_tokens": 3,\n "completion_tokens": 4}}'
    for number, work in enumerate(works):
        reply = Reply(status=200 if number else 400, body=body, request_id=f"r{number}")
        assert await store.items.finish(work.item, work.attempt, reply)
        assert not await store.items.finish(work.item, work.attempt, reply)
    assert (await again(store, batch)).status is BatchState.FINALIZING
    assert await events(store) == []

    store.now += 1
    await keeper.round()
    batch = await again(store, batch)
    assert (batch.status, batch.counts, batch.usage) == (BatchState.COMPLETED, Counts(5, 4, 1), Usage(15, 20))
    assert batch.completed_at == int(store.now)
    assert [row["custom_id"] for row in lines_of(store, batch.output_file_id)] == [f"request-{n}" for n in range(1, 5)]
    found = results(store, batch)
    assert found["request-0"]["response"] == {
        "status_code": 400, "request_id": "r0", "body": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}},
    }  # fmt: skip
    assert {line["id"] for line in found.values()} == {work.call.request_id for work in works}
    output = await store.files.get(TENANT, batch.output_file_id or "")
    assert output is not None
    assert (output.purpose, output.expires_at) == ("batch_output", int(store.now) + 3600)
    assert await events(store) == [("batch.completed", batch.id, "https://a.example/x")]

    await keeper.round()
    assert await store.read(lambda c: c.execute("SELECT count(*) FROM items").fetchone()[0]) == 0
    assert (await again(store, batch)).counts == Counts(5, 4, 1)


async def test_an_input_that_is_wrong_fails_and_runs_nothing(store: Timed) -> None:
    batch = await submit(store, jsonl(3) + b"nonsense\n", callback_url="https://a.example/")
    await Keeper(store).round()
    batch = await again(store, batch)
    assert (batch.status, batch.failed_at) == (BatchState.FAILED, int(store.now))
    assert [(error.code, error.line) for error in batch.errors or []] == [("invalid_json_line", 4)]
    assert not await store.items.waiting()
    assert await events(store) == [("batch.failed", batch.id, "https://a.example/")]


async def test_a_cancelled_batch_keeps_what_was_finished(store: Timed) -> None:
    keeper = Keeper(store)
    batch = await submit(store, jsonl(4))
    await keeper.round()
    first, second, *_ = await store.items.claim("w", 2)
    await store.items.finish(first.item, first.attempt, Reply(status=200, body=b"{}"))
    cancelled = await store.batches.cancel(TENANT, batch.id)
    assert cancelled is not None
    assert cancelled.status is BatchState.CANCELLING
    assert await store.items.extend([first, second]) == [first, second]
    assert not await store.items.finish(second.item, second.attempt, Reply(status=200, body=b"{}"))
    await keeper.round()
    batch = await again(store, batch)
    assert batch.status is BatchState.CANCELLED
    found = results(store, batch)
    codes = [line["error"] and line["error"]["code"] for line in found.values()]
    assert codes == [None, "batch_cancelled", "batch_cancelled", "batch_cancelled"]
    assert await store.batches.cancel(TENANT, batch.id) == batch


async def test_a_batch_cancelled_in_validation_ends_without_files(store: Timed) -> None:
    batch = await submit(store, jsonl(4))
    await store.batches.cancel(TENANT, batch.id)
    await Keeper(store).round()
    batch = await again(store, batch)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchState.CANCELLED, None, None)


async def test_a_batch_expires_with_what_was_finished(store: Timed) -> None:
    keeper = Keeper(store)
    batch = await submit(store, jsonl(2), window="1h")
    await keeper.round()
    [work] = await store.items.claim("w", 1)
    await store.items.finish(work.item, work.attempt, Reply(status=200, body=b"{}"))
    store.now += 3599
    assert await keeper.round() == store.now + 1
    store.now += 1
    assert await store.items.claim("w", 1) == []
    await keeper.round()
    batch = await again(store, batch)
    assert (batch.status, batch.counts) == (BatchState.EXPIRED, Counts(2, 1, 0))
    assert results(store, batch)["request-1"]["error"]["code"] == "batch_expired"


async def test_an_input_is_not_deleted_while_it_is_read(store: Timed) -> None:
    batch = await submit(store, jsonl(2))
    with pytest.raises(RequestError, match=batch.id):
        await store.files.delete(TENANT, batch.input_file_id)
    await Keeper(store).round()
    assert await store.files.delete(TENANT, batch.input_file_id)
    assert await answer_all(store) == 2


async def test_output_cannot_be_made_an_input(store: Timed) -> None:
    batch = await submit(store, jsonl(1))
    keeper = Keeper(store)
    await keeper.round()
    await answer_all(store)
    await keeper.round()
    made = (await again(store, batch)).output_file_id or ""
    with pytest.raises(RequestError, match="purpose"):
        await store.batches.create(tenant=TENANT, endpoint=ENDPOINT, input_file_id=made)


async def test_the_place_of_a_batch_counts_what_is_served_before_it(store: Timed) -> None:
    keeper = Keeper(store)
    early = await submit(store, jsonl(3, "early"))
    late = await submit(store, jsonl(2, "late"))
    await keeper.round()
    assert [await store.batches.ahead(await again(store, batch)) for batch in (early, late)] == [3, 5]
    await store.items.defer(call(urgency=Urgency.MEDIUM))
    assert [await store.batches.ahead(await again(store, batch)) for batch in (early, late)] == [4, 6]


# Deferred requests


async def test_a_deferred_request_and_its_answer(store: Timed) -> None:
    item = await store.items.defer(call(), callback_url="https://a.example/")
    assert (item.status, await store.items.ahead(item)) == ("queued", 1)
    assert await store.items.get("somebody else", item.name) is None
    [work] = await store.items.claim("w", 1)
    assert work.call == Call(url=ENDPOINT, body=b"{}", tenant=TENANT, request_id=item.name)
    running = await store.items.get(TENANT, item.name)
    assert running is not None
    assert running.status == "in_progress"
    await store.items.finish(work.item, work.attempt, Reply(status=200, body=b'{"x":1}', request_id="r"))
    done = await store.items.get(TENANT, item.name)
    assert done is not None
    assert (done.status, done.reply) == ("completed", Reply(status=200, body=b'{"x":1}', request_id="r"))
    assert await events(store) == [("job.completed", item.name, "https://a.example/")]
    assert (await store.items.list(TENANT)).data[0].name == item.name


async def test_cancel_and_delete(store: Timed) -> None:
    kept, dropped = [await store.items.defer(call()) for _ in range(2)]
    for name in (kept.name, kept.name):
        cancelled = await store.items.cancel(TENANT, name)
        assert cancelled is not None
        assert (cancelled.status, cancelled.error and cancelled.error.code) == ("cancelled", "job_cancelled")
    [work] = await store.items.claim("w", 5)
    assert not await store.items.delete("somebody else", dropped.name)
    assert await store.items.delete(TENANT, dropped.name)
    assert await store.items.get(TENANT, dropped.name) is None
    assert await store.items.extend([work]) == [work]
    assert not await store.items.finish(work.item, work.attempt, Reply(status=200, body=b"{}"))


async def test_deferred_requests_expire_and_are_forgotten(store: Timed) -> None:
    keeper = Keeper(store, keep_s=100.0)
    item = await store.items.defer(call(), window_s=50.0)
    assert await keeper.round() == store.now + 50
    store.now += 50
    await keeper.round()
    expired = await store.items.get(TENANT, item.name)
    assert expired is not None
    assert expired.status == "expired"
    store.now += 100
    await keeper.round()
    assert await store.items.get(TENANT, item.name) is None


async def test_an_answer_that_is_no_json_becomes_an_error(store: Timed) -> None:
    item = await store.items.defer(call())
    [work] = await store.items.claim("w", 1)
    assert await store.items.finish(work.item, work.attempt, Reply(status=200, body=b"<html>"))
    done = await store.items.get(TENANT, item.name)
    assert done is not None
    assert done.reply is not None
    assert (done.status, done.reply.status) == ("failed", 500)


# Leases


async def test_urgent_items_first_and_of_equal_ones_the_oldest(store: Timed) -> None:
    order = [Urgency.LOW, Urgency.MEDIUM, Urgency.LOW, Urgency.HIGH, Urgency.MEDIUM]
    items = [await store.items.defer(call(urgency=urgency)) for urgency in order]
    assert [await store.items.ahead(item) for item in items] == [4, 2, 5, 1, 3]
    works = [work for _ in range(3) for work in await store.items.claim("w", 2)]
    assert [work.item for work in works] == [items[index].id for index in (3, 1, 4, 0, 2)]


async def test_tenants_take_turns(store: Timed) -> None:
    """Who brings ten items does not wait for the hundred that another one brought before."""
    for _ in range(100):
        await store.items.defer(call("large"))
    assert len(await store.items.claim("w", 30)) == 30
    small = [await store.items.defer(call("small")) for _ in range(10)]
    assert [await store.items.ahead(item) for item in (small[0], small[-1])] == [31, 49]
    tenants = [work.call.tenant for work in await store.items.claim("w", 22)]
    assert tenants == ["small", "large"] * 10 + ["large"] * 2
    third = await store.items.defer(call("third"))
    assert await store.items.ahead(third) == 52 + 1
    assert len(await store.items.claim("w", 1000)) == 59


async def test_a_lease_that_is_over_is_given_to_another_and_the_first_is_refused(store: Timed) -> None:
    await store.items.defer(call())
    [first] = await store.items.claim("a", 1)
    store.now += LEASE_SECONDS - 1
    assert await store.items.extend([first]) == []
    store.now += LEASE_SECONDS - 1
    assert await store.items.claim("b", 1) == []
    store.now += 1
    [second] = await store.items.claim("b", 1)
    assert (second.item, second.attempt) == (first.item, 2)
    assert await store.items.extend([first, second]) == [first]
    assert not await store.items.finish(first.item, first.attempt, Reply(status=200, body=b'"first"'))
    assert not await store.items.release(first.item, first.attempt)
    assert await store.items.finish(second.item, second.attempt, Reply(status=200, body=b'"second"'))


async def test_a_clock_that_is_put_back_does_not_hold_leases_for_ever(store: Timed) -> None:
    await store.items.defer(call())
    assert await store.items.claim("a", 1)
    store.now -= 3600
    assert len(await store.items.claim("b", 1)) == 1


async def test_what_is_given_back_waits_as_long_as_it_should(store: Timed) -> None:
    await store.items.defer(call())
    [work] = await store.items.claim("a", 1)
    assert await store.items.release(work.item, work.attempt, delay=10.0)
    assert not await store.items.waiting()
    store.now += 10
    assert await store.items.waiting()
    [again] = await store.items.claim("a", 1)
    assert again.attempt == 2


async def test_an_item_that_kills_its_workers_ends_with_an_error(store: Timed) -> None:
    item = await store.items.defer(call())
    for attempt in range(1, SILENT_LEASES + 1):
        [work] = await store.items.claim(f"w{attempt}", 1)
        assert work.attempt == attempt
        await store.items.abandon(f"w{attempt}")
    assert await store.items.claim("last", 1) == []
    ended = await store.items.get(TENANT, item.name)
    assert ended is not None
    assert (ended.state, ended.error and ended.error.code) == (ItemState.FAILED, "gave_up")


async def test_who_gives_back_in_peace_is_not_held_against_the_item(store: Timed) -> None:
    await store.items.defer(call())
    for _ in range(3 * SILENT_LEASES):
        [work] = await store.items.claim("w", 1)
        await store.items.release(work.item, work.attempt)
        assert await store.items.claim("w", 1)
        await store.items.leave("w")
    assert await store.items.waiting()


async def test_many_claims_at_once_share_the_items(store: Timed) -> None:
    for _ in range(40):
        await store.items.defer(call())
    found = await asyncio.gather(*(store.items.claim(f"w{n}", 3) for n in range(20)))
    leased = [work.item for works in found for work in works]
    assert len(leased) == len(set(leased)) == 40
    depth = await store.items.depth()
    assert (depth.waiting[Urgency.LOW], depth.leased[Urgency.LOW]) == (0, 40)


async def test_no_lookup_reads_a_whole_table(store: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers, keepers and clients ask again and again is answered by an index, however many items there are."""
    seen: list[str] = []
    connect = Database._connect

    def watched(database: Database) -> sqlite3.Connection:
        connection = connect(database)
        connection.set_trace_callback(seen.append)
        return connection

    monkeypatch.setattr(Database, "_connect", watched)
    item = await store.items.defer(call())
    batch = await submit(store, jsonl(2))
    await Keeper(store).round()
    assert await store.items.waiting()
    [work] = await store.items.claim("w", 1)
    await store.items.extend([work])
    await store.items.release(work.item, work.attempt)
    await store.items.depth()
    await store.items.ahead(item)
    await store.batches.ahead(await again(store, batch))
    await store.items.list(TENANT)
    await answer_all(store)
    await Keeper(store).round()
    await store.files.delete(TENANT, batch.input_file_id)
    await Keeper(store).round()
    statements = {sql for sql in seen if sql.split(" ", 1)[0] in ("SELECT", "UPDATE", "DELETE")}
    assert len(statements) > 20
    scans = []
    for sql in statements:
        plan = await store.read(lambda c, sql=sql: [row["detail"] for row in c.execute(f"EXPLAIN QUERY PLAN {sql}")])
        scans += [
            (step, sql) for step in plan if re.match("SCAN (items|batches|files|bodies|replies)(?!.* USING)", step)
        ]
    assert not scans
