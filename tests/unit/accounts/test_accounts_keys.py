"""The table of keys: what is kept, what is not, and who is found by what."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.accounts import Accounts, Limits, keys
from ropeway.accounts.accounts import FRESH_NS, open_accounts
from ropeway.config import settings
from ropeway.config.accounts import KeyLimits
from ropeway.errors import ConfigError
from ropeway.store import Database


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Database]:
    with closing(open_accounts(tmp_path)) as database:
        yield database


def test_of_a_key_only_its_digest_is_kept(store: Database, tmp_path: Path) -> None:
    made = [store.write_now(lambda c, n=n: keys.create(c, f"k{n}", Limits())) for n in range(20)]
    assert len({secret for secret, _ in made}) == 20
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret, account in made:
        assert secret.startswith(account.hint)
        assert len(secret) == len("rw-") + 43, "256 bits"
        assert secret.encode() not in kept
        assert keys.digest_of(secret.encode()) in kept
        assert store.read_now(lambda c, s=secret: keys.find(c, keys.digest_of(s.encode()))) == account
    assert oct((tmp_path / "accounts.db").stat().st_mode & 0o777) == "0o600"


def test_what_is_nearly_a_key_is_none(store: Database) -> None:
    secret, account = store.write_now(lambda c: keys.create(c, "k", Limits()))
    for wrong in (secret[:-1], secret + "x", secret.swapcase(), account.id, account.hint, "k", "", "%", "' OR 1=1 --"):
        assert store.read_now(lambda c, w=wrong: keys.find(c, keys.digest_of(w.encode()))) is None
    with pytest.raises(ConfigError, match="no key"):
        store.read_now(lambda c: keys.named(c, secret))


def test_names_are_unique_among_the_living(store: Database) -> None:
    _, first = store.write_now(lambda c: keys.create(c, "k", Limits()))
    with pytest.raises(ConfigError, match="already"):
        store.write_now(lambda c: keys.create(c, "k", Limits()))
    revoked = store.write_now(lambda c: keys.revoke(c, "k"))
    assert revoked.revoked is not None
    assert store.write_now(lambda c: keys.revoke(c, first.id)) == revoked, "once is enough"
    _, second = store.write_now(lambda c: keys.create(c, "k", Limits()))
    assert store.read_now(lambda c: keys.named(c, "k")) == second
    assert store.read_now(lambda c: keys.named(c, first.id)) == revoked
    assert [one.id for one in store.read_now(keys.every)] == [first.id, second.id]
    with pytest.raises(ConfigError, match="for good"):
        store.write_now(lambda c: keys.update(c, first.id, lambda limits: limits))


LIMITS = st.builds(
    Limits,
    models=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    requests_per_minute=st.none() | st.integers(1, 10**9),
    tokens_per_minute=st.none() | st.integers(1, 10**9),
    concurrency=st.none() | st.integers(1, 10**9),
    max_prompt_tokens=st.none() | st.integers(1, 10**9),
    weight=st.floats(0.001, 1000),
    budget_tokens=st.none() | st.integers(0, 2**53 - 1),
    budget_cost=st.none() | st.floats(0, 999_999),
    budget_period=st.sampled_from(["month", "total"]),
)


@given(limits=LIMITS)
def test_every_limit_is_found_as_it_was_given(limits: Limits) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        for step in keys.SCHEMA.steps:
            connection.executescript(step)
        secret, account = keys.create(connection, "k", limits)
        assert account.limits == limits
        assert keys.find(connection, keys.digest_of(secret.encode())) == account


def test_the_command_line_can_say_every_limit_and_no_other() -> None:
    assert {setting.name for setting in settings(KeyLimits)} == set(Limits.__struct_fields__)


@pytest.mark.parametrize(
    "wrong",
    [
        Limits(requests_per_minute=0), Limits(tokens_per_minute=-1), Limits(concurrency=0), Limits(max_prompt_tokens=0),
        Limits(weight=0.0), Limits(weight=float("nan")), Limits(budget_tokens=-1), Limits(budget_cost=float("nan")),
    ],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(store: Database, wrong: Limits) -> None:
    with pytest.raises(ConfigError):
        store.write_now(lambda c: keys.create(c, "k", wrong))
    assert store.read_now(keys.every) == []


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "a=b", "a,b", "ä", "x" * 129, "=1+1", "a\n"])
def test_names_that_tables_and_lists_could_not_show_are_refused(store: Database, name: str) -> None:
    for fields in ({"name": name}, {"name": "k", "tenant": name or " "}):
        with pytest.raises(ConfigError):
            store.write_now(lambda c, f=fields: keys.create(c, limits=Limits(), **f))


def test_a_tenant_has_the_weight_of_its_heaviest_key(store: Database) -> None:
    for name, tenant, weight in (("a", "x", 2.0), ("b", "x", 3.0), ("c", "x", 9.0), ("d", "y", 1.0), ("e", "z", 0.5)):
        store.write_now(lambda c, n=name, t=tenant, w=weight: keys.create(c, n, Limits(weight=w), tenant=t))
    store.write_now(lambda c: keys.revoke(c, "c"))
    assert keys.weights(store.read_now(keys.every)) == {"x": 3.0, "z": 0.5}


async def test_a_server_learns_of_keys_while_it_runs(tmp_path: Path) -> None:
    clock, now = [0], [1.8e9]
    accounts = Accounts(tmp_path / "not-yet", clock=lambda: clock[0], now=lambda: now[0])
    assert not await accounts.required()
    assert await accounts.find(b"rw-x") is None
    assert not (tmp_path / "not-yet").exists(), "a server that nobody gives keys makes no files"
    with closing(open_accounts(tmp_path / "not-yet")) as store:
        secret, account = store.write_now(lambda c: keys.create(c, "k", Limits(), expires=int(now[0]) + 60))
        clock[0] += FRESH_NS + 1
        assert await accounts.required()
        assert await accounts.find(secret.encode()) == account
        now[0] += 60
        assert await accounts.find(secret.encode()) is None, "it has expired"
        now[0] -= 1
        assert await accounts.find(secret.encode()) == account
        store.write_now(lambda c: keys.revoke(c, "k"))
        clock[0] += FRESH_NS + 1
        assert await accounts.find(secret.encode()) is None
        found = await accounts.account(account.id)
        assert found is not None, "work that it has given before is still its own"
        assert found.revoked is not None
        assert await accounts.find(secret.encode()) is None, "although it was asked about by its id"
        assert await accounts.required(), "a server whose keys are all revoked is closed, not open"
    await accounts.close()
