"""Changes are on the disk before anybody hears of them, alone or together, and one that fails harms no other."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from threading import Barrier, Event

import pytest

from jobkit import quick_folder
from ropeway.errors import StorageError
from ropeway.store import Database, Schema

SCHEMA = Schema("things", ["CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL)"])


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as found:
        yield found


@pytest.fixture
def database(folder: Path) -> Iterator[Database]:
    opened = Database(folder / "a.db", [SCHEMA])
    yield opened
    opened.close()


def names(c: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in c.execute("SELECT name FROM things ORDER BY id")]


def adding(name: str) -> object:
    return lambda c: c.execute("INSERT INTO things (name) VALUES (?)", (name,)).lastrowid


async def test_each_of_many_changes_at_once_is_kept(database: Database) -> None:
    numbers = await asyncio.gather(*(database.write(adding(f"n{i}")) for i in range(500)))
    assert sorted(numbers) == list(range(1, 501))
    assert await database.read(names) == [f"n{i}" for i in range(500)]


async def test_a_change_that_fails_takes_nothing_back_but_itself(database: Database) -> None:
    def half(c: sqlite3.Connection) -> None:
        c.execute("INSERT INTO things (name) VALUES ('half')")
        raise ValueError("enough")

    same = [database.write(adding(name)) for name in ("a", "b", "a", "c")]
    found = await asyncio.gather(database.write(half), *same, return_exceptions=True)
    assert isinstance(found[0], ValueError)
    assert isinstance(found[3], sqlite3.IntegrityError)
    assert await database.read(names) == ["a", "b", "c"]


def test_what_was_heard_of_outlives_a_kill(folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from ropeway.store import Database, Schema\n"
        f"d = Database(Path({str(folder / 'a.db')!r}), [Schema('things', [{SCHEMA.steps[0]!r}])])\n"
        "for i in range(20): d.write_now(lambda c: c.execute('INSERT INTO things (name) VALUES (?)', (f'n{i}',)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    opened = Database(folder / "a.db", [SCHEMA])
    assert opened.read_now(names) == [f"n{i}" for i in range(20)]
    opened.close()


def test_processes_that_open_a_new_file_together_all_succeed(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ropeway.store import Database, Schema\n"
        f"d = Database(Path({str(folder / 'a.db')!r}), [Schema('things', [{SCHEMA.steps[0]!r}])])\n"
        "for i in range(20): d.write_now(lambda c: c.execute('INSERT INTO things (name) VALUES (?)',"
        " (f'{sys.argv[1]}-{i}',)))\nd.close()"
    )
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for number in range(6):
            running.append(stack.enter_context(subprocess.Popen([sys.executable, "-c", code, str(number)])))
            stack.callback(running[-1].kill)
        assert [process.wait(60) for process in running] == [0] * 6
    opened = Database(folder / "a.db", [SCHEMA])
    assert len(opened.read_now(names)) == 120
    opened.close()


def test_whoever_opens_a_new_file_waits_for_those_who_do_so_too(folder: Path) -> None:
    """SQLite, which waits for locks, does not where two who enter WAL mode would wait for each other."""
    visitors, turns = 6, 120
    together = Barrier(visitors, timeout=60)

    def visit(number: int) -> None:
        luck = Random(number)
        for turn in range(turns):
            together.wait()
            time.sleep(luck.random() * 0.003)
            Database(folder / f"{turn}.db", [SCHEMA]).close()

    with ThreadPoolExecutor(visitors) as pool:
        list(pool.map(visit, range(visitors)))


def test_nobody_else_on_the_machine_reads_it(database: Database) -> None:
    database.write_now(adding("secret"))
    for path in database.path.parent.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_tables_grow_with_the_version_and_a_newer_file_is_refused(folder: Path) -> None:
    path = folder / "a.db"
    older = Database(path, [SCHEMA])
    older.write_now(adding("a"))
    older.close()

    newer = Schema("things", [*SCHEMA.steps, "ALTER TABLE things ADD COLUMN size INTEGER NOT NULL DEFAULT 7"])
    upgraded = Database(path, [newer])
    assert upgraded.read_now(lambda c: c.execute("SELECT size FROM things").fetchone()["size"]) == 7
    upgraded.close()

    with pytest.raises(StorageError, match="newer Ropeway") as refused:
        Database(path, [SCHEMA])
    assert not path.with_name("a.db-wal").exists(), f"it is still open after: {refused.value}"


def test_a_step_that_fails_leaves_the_version_before(folder: Path) -> None:
    path = folder / "a.db"
    Database(path, [SCHEMA]).close()
    broken = Schema("things", [*SCHEMA.steps, "ALTER TABLE things ADD COLUMN size INTEGER; ALTER TABLE nothing DROP x"])
    with pytest.raises(StorageError):
        Database(path, [broken])
    reopened = Database(path, [SCHEMA])
    assert "size" not in reopened.read_now(lambda c: [row["name"] for row in c.execute("PRAGMA table_info(things)")])
    reopened.close()


def test_what_is_no_database_is_said_so_with_its_name(folder: Path) -> None:
    (folder / "a.db").write_bytes(
        b"this is something else, and quite long, so that nobody takes it for an empty file\n" * 20
    )
    with pytest.raises(StorageError, match=r"a\.db"):
        Database(folder / "a.db", [SCHEMA])


def test_a_folder_that_cannot_be_written_names_the_way_out(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(StorageError, match="--data-dir"):
        Database(folder / "file" / "a.db", [SCHEMA])


async def test_a_reader_sees_one_moment(database: Database) -> None:
    database.write_now(adding("a"))

    def twice(c: sqlite3.Connection) -> tuple[int, int]:
        before = len(names(c))
        database.write_now(adding("b"))
        return before, len(names(c))

    assert await database.read(twice) == (1, 1)
    assert await database.read(names) == ["a", "b"]


async def test_who_keeps_an_error_does_not_keep_an_old_moment(database: Database) -> None:
    await asyncio.gather(*(database.write(adding(f"n{i}")) for i in range(5)))

    def half(c: sqlite3.Connection) -> None:
        rows = c.execute("SELECT name FROM things")
        next(rows)
        raise ValueError("enough")

    kept = await asyncio.gather(
        *(act(half) for act in (database.read, database.write) for _ in range(4)), return_exceptions=True
    )
    assert all(isinstance(error, ValueError) for error in kept)
    other = Database(database.path, [SCHEMA])
    other.write_now(adding("new"))
    other.close()
    assert all("new" in found for found in await asyncio.gather(*(database.read(names) for _ in range(8))))
    assert await database.write(adding("newer"))


def test_closing_writes_what_was_put_and_then_refuses(folder: Path) -> None:
    opened = Database(folder / "a.db", [SCHEMA])
    futures = [opened._put(adding(f"n{i}")) for i in range(300)]
    opened.close()
    opened.close()
    assert [future.result(0) for future in futures] == list(range(1, 301))
    with pytest.raises(StorageError, match="closed"):
        opened.write_now(adding("late"))


def together(database: Database, *works: object) -> list[Future[object]]:
    """Put all of them while the writer is busy, so that they share a transaction."""
    begun, go = Event(), Event()

    def busy(_: sqlite3.Connection) -> None:
        begun.set()
        assert go.wait(60)

    first = database._put(busy)
    assert begun.wait(60)
    futures = [database._put(work) for work in works]  # type: ignore[arg-type]
    go.set()
    first.result(60)
    return futures


def test_a_commit_that_fails_is_heard_of_by_all_and_keeps_nothing(folder: Path) -> None:
    """Of what is checked at the end of a transaction alone nobody can say whose fault it is."""
    parts = "CREATE TABLE parts (thing INTEGER REFERENCES things DEFERRABLE INITIALLY DEFERRED)"
    database = Database(folder / "a.db", [SCHEMA, Schema("parts", [parts])])
    orphan = lambda c: c.execute("INSERT INTO parts VALUES (7)")  # noqa: E731
    for future in together(database, adding("a"), orphan, adding("b")):
        assert isinstance(future.exception(60), sqlite3.IntegrityError)
    assert database.read_now(names) == []
    database.write_now(adding("c"))
    assert database.read_now(names) == ["c"]
    database.close()


def test_a_full_disk_takes_back_all_that_shared_the_transaction(database: Database) -> None:
    """SQLite leaves the transaction by itself then: who went well before has lost it too, and is told."""
    pages = database.write_now(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    database.write_now(lambda c: c.execute(f"PRAGMA max_page_count={pages + 8}").fetchone())
    for future in together(database, adding("a"), adding("x" * 200_000), adding("b")):
        with pytest.raises(StorageError, match=r"full.*Free some space"):
            future.result(60)
    assert database.read_now(names) == []
    database.write_now(adding("c"))
    assert database.read_now(names) == ["c"]
