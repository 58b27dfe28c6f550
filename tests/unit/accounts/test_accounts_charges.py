"""Charges of jobs: entered once whoever brings them how often, and by the terms of the key's own server."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from ropeway.accounts import Accounts, Limits, Prices
from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.charges import Charge, Terms, Used, enter
from ropeway.accounts.prices import Price
from ropeway.accounts.usage import Query, ask, best_pace
from ropeway.errors import BudgetError, ContextLengthError, UnknownModelError

PRICES = Prices({"m": Price(1.0, 2.0)})


def charge(number: int, tokens: int = 3, key: str = "k") -> Charge:
    used = Used(model="m", prompt=tokens, cached=1, answer=2)
    return Charge(number=number, at=1.8e9, key=key, tenant="t", used=used)


def test_a_charge_is_entered_once_however_often_it_is_brought(tmp_path: Path) -> None:
    """Several processes bring portions of two sources again and again, and are cut off before they say so."""
    random_ = random.Random(5)
    charges = {source: [charge(n, random_.randrange(1, 99), source) for n in range(1, 400)] for source in "ab"}
    entered, done = Counter[str](), Counter[str]()
    with closing(open_accounts(tmp_path)) as store:
        while any(done[source] < 399 for source in "ab"):
            source = random_.choice("ab")
            first = random_.randrange(max(0, done[source] - 9), done[source] + 1)  # what was not crossed out yet
            some = charges[source][first : first + random_.randrange(1, 20)]
            if random_.random() < 0.2:
                with pytest.raises(ZeroDivisionError):
                    store.write_now(lambda c, s=source, p=some: (enter(c, s, p, PRICES), 1 / 0))
                continue
            new = store.write_now(lambda c, s=source, p=some: enter(c, s, p, PRICES))
            entered[source] += len(new)
            done[source] = max(done[source], first + len(some))
        rows = store.read_now(lambda c: ask(c, Query(by=("key",))))
    assert entered == {"a": 399, "b": 399}
    assert {row.key for row in rows} == {"a", "b"}
    for row in rows:
        assert row.key is not None
        tokens = sum(one.used.prompt for one in charges[row.key])
        assert (row.requests, row.prompt_tokens, row.completion_tokens) == (399, tokens, 798)
        assert row.cost == pytest.approx((tokens + 2 * 798) / 1e6)


async def test_what_no_answer_is_kept_of_is_counted_at_once_with_its_price(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path, PRICES)
    for _ in range(2):
        accounts.count(charge(1, 100).used, tenant="t")
    [row] = await accounts.usage(Query(by=("key", "tenant", "model")))
    assert (row.key, row.tenant, row.model, row.requests) == ("", "t", "m", 2)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (200, 2, 4)
    assert row.cost == pytest.approx((200 + 2 * 4) / 1e6)
    await accounts.close()


async def lacks(accounts: Accounts, key: str, terms: Terms | None, asked: int, left: int) -> None:
    """A job of that key may not take so many tokens, as no more than `left` are left to it."""
    meter = await accounts.meter_of_job(key, "t", terms)
    assert meter is not None
    meter.begin("m")
    with pytest.raises(BudgetError, match=f"{left} are left"):
        meter.reserve(asked, 0)
    meter.end(0, 0, 0)


async def test_a_key_s_limits_hold_where_nobody_knows_the_key(tmp_path: Path) -> None:
    """What the key's own server says goes with the call; what is used there is nobody's usage here."""
    limits = Limits(models=("m",), max_prompt_tokens=50, budget_tokens=100, budget_cost=1.0, requests_per_minute=1)
    home = Accounts(tmp_path / "home", PRICES)
    _, account = await home.create("alice", limits)
    away = Accounts(tmp_path / "away")
    terms = await home.terms(account.id)
    assert terms is not None
    assert terms.account is not None
    assert terms.account.hint == ""
    assert await away.meter_of_job(account.id, "t", None) is None, "nobody here has heard of it"
    for _ in range(3):  # and no rate is asked
        meter = await away.meter_of_job(account.id, "t", terms)
        assert meter is not None
        assert meter.account == terms.account
        with pytest.raises(UnknownModelError):
            meter.begin("another")
        meter.begin("m")
        with pytest.raises(ContextLengthError):
            meter.reserve(51, 1)
        meter.end(0, 0, 0)
    for first in (True, False, False):
        meter = await away.meter_of_job(account.id, "t", terms)
        assert meter is not None
        meter.begin("m")
        meter.reserve(20, 20)
        meter.end(20, 10, 5)
        assert meter.used == Used(model="m", prompt=20, cached=10, answer=5)
        if first:
            meter.forgive()  # nobody has got it
            assert meter.used is None
            meter.begin("m")
            meter.reserve(20, 20)
            meter.end(20, 10, 5)
    await lacks(away, account.id, terms, 26, left=25)
    told = Terms(account=terms.account, period=terms.period, spent=(99, 0), prices=PRICES)
    await lacks(away, account.id, told, 2, left=1)
    last_month = Terms(account=terms.account, period="2001-01", spent=(100, 0))
    assert (await away.meter_of_job(account.id, "t", last_month)) is not None
    assert await away.usage(Query(by=())) == []
    assert await away.terms(account.id) == Terms(), "what has computed something counts, but knows no such key"
    await home.close()
    await away.close()


async def test_what_others_have_computed_is_in_the_usage_and_the_budget_of_the_key(tmp_path: Path) -> None:
    clock = [0]
    accounts = Accounts(tmp_path, PRICES, clock=lambda: clock[0], now=lambda: 1.8e9)
    _, account = await accounts.create("alice", Limits(budget_tokens=10))
    assert await accounts.account(account.id) == account
    for _ in range(2):
        await accounts.enter("here", [charge(1, key=account.id), charge(2, key=account.id)])
    [row] = await accounts.usage(Query(by=("key",)))
    assert (row.key, row.requests, row.total_tokens, row.cost) == (account.id, 2, 10, 14e-6)
    clock[0] += 10**9
    await lacks(accounts, account.id, None, 1, left=0)
    [metric] = [one for one in accounts.families() if one.name.endswith("requests")]
    assert [sample.value for sample in metric.samples if sample.labels.get("key") == "alice"] == [2]
    await accounts.close()
    with closing(open_accounts(tmp_path)) as store:
        assert store.read_now(lambda c: best_pace(c, 0)) is None, "this machine has computed nothing"


async def test_nothing_is_written_where_nobody_counts(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "data")
    await accounts.enter("here", [charge(1, key="")])
    assert await accounts.terms("") is None
    await accounts.close()
    assert not (tmp_path / "data").exists()
