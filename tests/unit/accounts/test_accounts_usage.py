"""Usage: nothing is lost and nothing counts twice, prices are exact, and reports say what was used."""

from __future__ import annotations

import asyncio
import csv
import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.accounts import Prices, read_prices
from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.meter import in_units
from ropeway.accounts.prices import Price
from ropeway.accounts.table import as_csv, as_text
from ropeway.accounts.usage import HOUR, Amounts, Ledger, Query, ask, best_pace, first_hour, spent
from ropeway.errors import ConfigError, StorageError
from ropeway.store import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(open_accounts(tmp_path)) as found:
        yield found


def ledger_of(database: Database, *now: Callable[[], float]) -> Ledger:
    async def open_() -> Database:
        return database

    return Ledger(open_, *now)


async def test_no_usage_is_lost_or_counted_twice_when_writing_fails_and_waiters_leave(database: Database) -> None:
    random_ = random.Random(3)
    failing = True

    async def open_() -> Database:
        await asyncio.sleep(0)
        if failing and random_.random() < 0.4:
            raise StorageError("the disk is full")
        return database

    ledger, told = Ledger(open_, lambda: 1.8e9), Counter[str]()

    async def user(name: str) -> None:
        for _ in range(200):
            tokens = random_.randrange(1, 100)
            ledger.add(name, "t", "m", Amounts(1, tokens, 0, 1, 5, 0))
            told[name] += tokens
            waiting = asyncio.ensure_future(ledger.flush())
            await asyncio.sleep(random_.random() * 0.002)
            if random_.random() < 0.5:
                waiting.cancel()
            for outcome in await asyncio.gather(waiting, return_exceptions=True):
                assert outcome is None or isinstance(outcome, StorageError | asyncio.CancelledError)

    await asyncio.gather(*(user(f"k{number}") for number in range(8)))
    failing = False
    await ledger.close()
    rows = database.read_now(lambda c: ask(c, Query(by=("key",))))
    assert {row.key: row.prompt_tokens for row in rows} == told
    assert all(row.requests == row.completion_tokens == 200 for row in rows)


async def test_what_a_full_disk_does_not_take_is_kept_with_the_pace_and_told_of_when_it_is_lost(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    full, now = True, [1.8e9]

    async def open_() -> Database:
        if full:
            raise StorageError("the disk is full")
        return database

    ledger = Ledger(open_, lambda: now[0])
    for _ in range(3):
        ledger.start("m")
        now[0] += 40
        ledger.stop("m", 1000)
        with pytest.raises(StorageError):
            await ledger.flush()
    full = False
    await ledger.flush()
    assert database.read_now(lambda c: best_pace(c, 0)) == (25.0, 120.0)
    full = True
    ledger.add("k", "", "m", Amounts(requests=1, prompt=5))
    await ledger.close()
    said = [record.message for record in caplog.records]
    assert said == [
        "usage cannot be written, and is kept in memory meanwhile: the disk is full",
        "usage cannot be written, and is kept in memory meanwhile: the disk is full",
        "the usage of the last moments is lost: the disk is full",
    ], "each trouble is said once"


async def test_what_works_when_the_server_ends_has_worked_until_then(database: Database) -> None:
    now = [1.8e9]
    ledger = ledger_of(database, lambda: now[0])
    ledger.start("m")
    ledger.start("m")
    ledger.stop("m", 6000)
    now[0] += 60
    await ledger.close()
    assert database.read_now(lambda c: best_pace(c, 0)) == (100.0, 60.0)


async def test_a_flush_returns_when_what_was_added_before_is_on_the_disk(database: Database) -> None:
    ledger = ledger_of(database)

    async def work(number: int) -> None:
        ledger.add(f"k{number}", "", "m", Amounts(requests=1, prompt=number))
        await ledger.flush()
        [row] = database.read_now(lambda c: ask(c, Query(by=(), key=f"k{number}")))
        assert row.prompt_tokens == number

    await asyncio.gather(*(work(number) for number in range(1, 200)))
    await ledger.close()


@given(
    price=st.builds(Price, *(st.integers(0, 10**6).map(lambda n: n / 1000) for _ in range(3))),
    cached=st.integers(0, 10**6),
    more=st.integers(0, 10**6),
    answer=st.integers(0, 10**6),
)
def test_a_cost_is_exact_to_half_a_billionth(price: Price, cached: int, more: int, answer: int) -> None:
    assert price.cached is not None
    rates = [Fraction(round(rate * 1000), 1000) for rate in (price.input, price.cached, price.output)]
    exact = (rates[0] * more + rates[1] * cached + rates[2] * answer) / 10**6
    cost = price.cost(more + cached, cached, answer)
    assert abs(Fraction(cost, 10**9) - exact) <= Fraction(1, 2 * 10**9)
    assert Fraction(in_units(cost)) == Fraction(cost, 10**9)
    assert "e" not in in_units(cost)


def test_prices_are_by_model_or_for_all(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\nmachine: 0.4\nmodels:\n  a: {input: 1, output: 2}\n  '*': {input: 0.5}\n")
    prices = read_prices(path)
    assert prices == Prices({"a": Price(1, 2), "*": Price(0.5)}, "EUR", 0.4)
    assert prices.cost("a", 10**6, 10**6, 10**6) == 3 * 10**9, "cached tokens cost what others do, if nobody says"
    assert prices.cost("b", 2, 0, 10**6) == 1000
    assert Prices({"a": Price()}).cost("b", 1, 0, 1) is None


@pytest.mark.parametrize(
    "text", ["models: {a: {inptu: 1}}", "models: [1]", "a: [", "machine: -1", "models: {a: {input: .nan}}", "- 1"]
)
def test_prices_that_are_wrong_are_refused_with_the_file_s_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"prices\.yaml"):
        read_prices(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prices(tmp_path / "none.yaml")


async def test_usage_is_told_by_whatever_one_asks(database: Database) -> None:
    """Every question is answered as a loop over all that happened would."""
    random_, now = random.Random(11), [0.0]
    ledger = ledger_of(database, lambda: now[0])
    events = []
    for _ in range(300):
        now[0] = 1.79e9 + random_.randrange(80 * 24) * HOUR + random_.randrange(HOUR)
        key, tenant, model = random_.choice("ab"), random_.choice("tu"), random_.choice("mn")
        amounts = Amounts(1, random_.randrange(100), 3, random_.randrange(100), random_.randrange(10**9), 0)
        events.append((now[0], key, tenant, model, amounts))
        ledger.add(key, tenant, model, amounts)
    await ledger.flush()
    for by in ((), ("key",), ("day",), ("month", "model"), ("hour", "key", "tenant", "model")):
        for key, since in ((None, None), ("a", None), (None, 1_791_000_000 // HOUR * HOUR)):
            wanted = [e for e in events if key in (None, e[1]) and e[0] >= (since or 0)]
            query = Query(by=by, key=key, since=since)
            rows = database.read_now(lambda c, query=query: ask(c, query))
            assert sum(row.requests for row in rows) == len(wanted)
            assert sum(row.total_tokens for row in rows) == sum(e[4].prompt + e[4].answer for e in wanted)
            assert sum(row.cost or 0 for row in rows) == pytest.approx(sum(e[4].cost for e in wanted) / 1e9)
            named = [tuple(getattr(row, name) for name in by) for row in rows]
            assert len(set(named)) == len(named)
            read = list(csv.DictReader(io.StringIO(as_csv(rows, by))))
            assert [int(line["total_tokens"]) for line in read] == [row.total_tokens for row in rows]
            assert len(as_text(rows, by).splitlines()) == len(rows) + 1
    total = database.read_now(lambda c: spent(c, "a", 0))
    assert total[0] == sum(e[4].prompt + e[4].answer for e in events if e[1] == "a")
    assert database.read_now(lambda c: first_hour(c, 0)) == min(int(e[0]) // HOUR for e in events)
    await ledger.close()


async def test_what_has_no_price_has_no_cost_rather_than_a_wrong_one(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.add("k", "", "m", Amounts(1, 10, 0, 0, 7, 0))
    ledger.add("k", "", "n", Amounts(1, 10, 0, 0, 0, 10))
    await ledger.close()
    rows = database.read_now(lambda c: ask(c, Query(by=("model",))))
    assert [row.cost for row in rows] == [7e-9, None]
    assert database.read_now(lambda c: ask(c, Query(by=())))[0].cost is None
    assert as_csv(rows, ("model",)).splitlines()[1:] == ["m,1,10,0,0,10,0.000000007", "n,1,10,0,0,10,"]


async def test_the_pace_is_tokens_for_each_second_in_which_somebody_was_answered(database: Database) -> None:
    now = [1.8e9]
    ledger = ledger_of(database, lambda: now[0])
    for hour, tokens in ((0, 1000), (1, 5000)):
        now[0] = 1.8e9 + hour * HOUR
        ledger.start("m")
        now[0] += 30
        ledger.start("m")  # two at a time are one stretch of work
        now[0] += 70
        ledger.stop("m", tokens)
        ledger.stop("m", tokens)
        now[0] += 500  # nothing to do
        ledger.add("k", "", "m", Amounts(1, 10**9, 0, 0))  # who pays for what is another matter
        await ledger.flush()
    assert database.read_now(lambda c: best_pace(c, 0)) == (100.0, 100.0)
    assert database.read_now(lambda c: best_pace(c, 0, "other")) is None
    await ledger.close()
