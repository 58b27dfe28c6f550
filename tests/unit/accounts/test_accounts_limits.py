"""Limits against an exact model: over 100,000 random events nothing is let through that the model would refuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.accounts import Account, Accounts, Limits, Meter, keys
from ropeway.accounts.account import Period
from ropeway.accounts.accounts import FRESH_NS, open_accounts
from ropeway.accounts.bucket import MINUTE_NS, Bucket, Loan
from ropeway.accounts.standing import FIRST_GUESS, Standing, seconds
from ropeway.errors import BudgetError, ContextLengthError, RateLimitError, TokenLimitError, UnknownModelError

SECOND = 10**9


class Windows:
    """The definition of a rate, with no bucket in it: in every stretch of time ending now, at most `limit` and what the
    rate gives for its length. What is charged may be corrected, as of when it was charged.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._now = 0
        self._lowest = 0
        self._total = 0

    def room(self, now: int) -> int:
        """What may still be used."""
        self._now = max(self._now, now)
        self._lowest = min(self._lowest, self._total * MINUTE_NS - self.limit * self._now)
        return (self.limit * (MINUTE_NS + self._now) + self._lowest) // MINUTE_NS - self._total

    def use(self, amount: int) -> None:
        self._total += amount


@given(
    limit=st.integers(1, 50),
    events=st.lists(st.tuples(st.integers(-2 * SECOND, 90 * SECOND), st.integers(0, 60)), max_size=60),
)
def test_a_bucket_lets_through_what_no_window_forbids_and_all_of_it(limit: int, events: list[tuple[int, int]]) -> None:
    bucket, model, now = Bucket(limit, 0), Windows(limit), 0
    for step, amount in events:
        now += step  # also backwards
        room = model.room(now)
        assert bucket.left(now) == room
        wait = bucket.take(amount, now)
        assert (wait == 0) == (amount <= room)
        assert (wait is None) == (amount > limit)
        if wait == 0:
            model.use(amount)
        elif wait is not None and now >= model._now:
            assert bucket.take(amount, now + wait - 1) != 0, "it could have come earlier"
            now += wait
            assert bucket.take(amount, now) == 0, "it was told to come now"
            assert model.room(now) >= amount
            model.use(amount)


@given(taken=st.integers(0, 1000), used=st.integers(0, 5000), later=st.integers(0, 120 * SECOND))
def test_what_is_given_back_is_never_more_than_fits_and_debts_are_paid(taken: int, used: int, later: int) -> None:
    bucket, loan = Bucket(1000, 0), Loan()
    assert bucket.take(taken, 0, loan) == 0
    bucket.settle(loan, used, 0)
    assert bucket.left(0) == max(0, 1000 - used)
    assert bucket.left(later) == max(0, min(1000, 1000 - used + later * 1000 // MINUTE_NS))
    assert bucket.left(later + bucket.until_full(later)) == 1000


EVENT = st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 60), st.integers(0, 60), st.booleans())


@given(limit=st.integers(20, 100), events=st.lists(EVENT, max_size=60), one=st.booleans())
def test_what_comes_back_is_as_if_it_had_never_been_gone(
    limit: int, events: list[tuple[int, int, int, bool]], one: bool
) -> None:
    """Against windows that charge what is used at the moment of taking, which they know in advance: never more, and
    with one loan at a time exactly as much."""
    bucket, model, now = Bucket(limit, 0), Windows(limit), 0
    loans: list[tuple[Loan, int]] = []
    for step, amount, used, settles in events:
        now += step
        room = model.room(now)
        assert bucket.left(now) <= room
        if loans and (one or settles):
            bucket.settle(*loans.pop(amount % len(loans)), now)
        if one:
            assert bucket.left(now) == room
        loan = Loan()
        if bucket.take(amount, now, loan) == 0:
            assert amount <= room
            model.use(min(used, amount))
            loans.append((loan, min(used, amount)))
    for loan, used in loans:
        bucket.settle(loan, used, now)
    assert bucket.left(now + 60 * SECOND) == limit


def test_a_change_of_the_limit_forgives_nothing() -> None:
    bucket = Bucket(100, 0)
    assert bucket.take(80, 0) == 0
    bucket.resize(200, 0)
    assert bucket.left(0) == 120
    bucket.resize(50, 0)
    assert bucket.left(0) == 0
    assert bucket.take(1, 0) == 31 * MINUTE_NS // 50


def test_a_change_of_the_limit_takes_nothing_that_was_only_lent() -> None:
    for limit in (8, 10, 20):
        bucket, loan = Bucket(10, 0), Loan()
        assert bucket.take(5, 0, loan) == 0
        bucket.resize(limit, 0)
        bucket.settle(loan, 0, 0)
        assert bucket.left(0) == limit


@dataclass
class World:
    """A server's accounts under a clock of our own, and the requests that it has under way."""

    accounts: Accounts
    folder: Path
    clock: Callable[[], int]
    under_way: list[tuple[Meter, int, int]] = field(default_factory=list)

    async def new_key(self, name: str, limits: Limits) -> tuple[bytes, Account]:
        with closing(open_accounts(self.folder)) as store:  # as another process would
            secret, account = store.write_now(lambda connection: keys.create(connection, name, limits))
        return secret.encode(), account

    def revoke(self, name: str) -> None:
        with closing(open_accounts(self.folder)) as store:
            store.write_now(lambda connection: keys.revoke(connection, name))


@pytest.fixture
def clock() -> list[int]:
    return [1000 * SECOND]


@pytest.fixture
def world(tmp_path: Path, clock: list[int]) -> World:
    read = lambda: clock[0]  # noqa: E731
    return World(Accounts(tmp_path, clock=read, now=lambda: 1.8e9 + clock[0] / SECOND), tmp_path, read)


def finish(world: World) -> None:
    for meter, _, used in world.under_way:
        meter.end(used, 0, 0)
        meter.leave()
    world.under_way.clear()


BUDGET = 150_000
LIMITS = Limits(requests_per_minute=120, tokens_per_minute=20_000, concurrency=12, budget_tokens=BUDGET)


async def test_nothing_is_let_through_that_an_exact_model_refuses(world: World, clock: list[int]) -> None:
    """Bursts, clocks that jump both ways, answers that end early or are broken off, keys that are revoked while their
    answers run: in no stretch of time have more requests or tokens been let through than the limits say."""
    random_ = random.Random(7)
    number, let, refused, broke, alive = 0, 0, 0, 0, True
    key, account = await world.new_key("k0", LIMITS)
    requests, tokens, spent, held = Windows(120), Windows(20_000), 0, 0
    for _ in range(100_000):
        event = random_.random()
        if event < 0.02:
            clock[0] += random_.randrange(40 * SECOND)
        elif event < 0.03:
            clock[0] -= random_.randrange(20 * SECOND)
        elif event < 0.45:
            clock[0] += random_.randrange(SECOND // 2)
        elif event < 0.4505:
            world.revoke(account.id)
            clock[0] += 100 * SECOND  # what was known of it is stale then, even if the clock had been set back
            assert await world.accounts.find(key) is None
            alive = False
        elif event < 0.7 and world.under_way:
            tokens.room(clock[0])  # it hears of the time whenever the bucket does
            meter, reserved, used = world.under_way.pop(random_.randrange(len(world.under_way)))
            meter.end(used - used // 3, 0, used // 3)
            meter.leave()
            held -= reserved
        else:
            if not alive:
                number += 1
                finish(world)
                assert world.accounts._standings[account.id].running == 0
                key, account = await world.new_key(f"k{number}", LIMITS)
                requests, tokens, spent, held, alive = Windows(120), Windows(20_000), 0, 0, True
            prompt, answer = random_.randrange(1, 900), random_.randrange(1, 900)
            used = prompt + random_.choice([answer, random_.randrange(answer + 1)])
            assert await world.accounts.find(key) == account
            meter = world.accounts.meter(account)
            assert meter is not None
            try:
                meter.enter()
            except RateLimitError:
                refused += 1
                assert requests.room(clock[0]) < 1 or len(world.under_way) == 12
                continue
            assert requests.room(clock[0]) >= 1, "one request too many"
            requests.use(1)
            tokens.room(clock[0])
            try:
                meter.begin("m")
                meter.reserve(prompt, answer)
            except (TokenLimitError, BudgetError) as error:
                refused += 1
                if isinstance(error, BudgetError):
                    broke += 1
                    done = spent - sum(used for _, _, used in world.under_way)
                    assert done + held + prompt + answer > BUDGET
                meter.end(0, 0, 0)
                meter.leave()
                continue
            assert tokens.room(clock[0]) >= used, "too many tokens"
            tokens.use(used)
            let, spent, held = let + 1, spent + used, held + prompt + answer
            world.under_way.append((meter, prompt + answer, used))
            assert len(world.under_way) <= 12
            assert spent <= BUDGET
    assert let > 5_000
    assert refused > 5_000
    assert broke > 1_000
    assert number > 20, "so many keys were revoked while their answers ran"
    finish(world)
    clock[0] = max(clock[0], requests._now, tokens._now) + 60 * SECOND
    standing = world.accounts._standings[account.id]
    assert standing.running == 0
    assert (b"x-ratelimit-remaining-tokens", b"20000") in standing.headers(clock[0])
    assert (b"x-ratelimit-remaining-requests", b"120") in standing.headers(clock[0])
    await world.accounts.close()


async def test_a_limit_that_is_changed_holds_within_a_second(world: World, clock: list[int]) -> None:
    key, account = await world.new_key("k", Limits(requests_per_minute=5))
    assert await world.accounts.find(key) == account
    first = world.accounts.meter(account)
    assert first is not None
    first.enter()
    with closing(open_accounts(world.folder)) as store:
        less = store.write_now(lambda c: keys.update(c, "k", lambda _: Limits(requests_per_minute=1)))
    clock[0] += FRESH_NS + 1
    assert await world.accounts.find(key) == less
    again = world.accounts.meter(less)
    assert again is not None
    with pytest.raises(RateLimitError, match="1 requests a minute"):
        again.enter()
    await world.accounts.close()


@pytest.mark.parametrize(("period", "later"), [("month", 0.0), ("total", 400 * 86400.0)])
async def test_what_was_spent_before_a_restart_is_spent(
    world: World, tmp_path: Path, period: Period, later: float
) -> None:
    key, _ = await world.new_key("k", Limits(budget_tokens=100, budget_period=period))
    for accounts in (world.accounts, Accounts(tmp_path, clock=world.clock, now=lambda: 1.8e9 + later)):
        found = await accounts.find(key)
        assert found is not None
        meter = accounts.meter(found)
        assert meter is not None
        meter.enter()
        meter.begin("m")
        if accounts is world.accounts:
            meter.reserve(40, 30)
            meter.end(40, 0, 30)
            meter.leave()
            await accounts.close()
        else:
            with pytest.raises(BudgetError, match="100 tokens; 30 are left, and this request may take 31"):
                meter.reserve(1, 30)
            meter.end(0, 0, 0)
            await accounts.close()


async def test_two_servers_share_budgets_and_have_rates_of_their_own(
    world: World, tmp_path: Path, clock: list[int]
) -> None:
    key, _ = await world.new_key("k", Limits(budget_tokens=100, requests_per_minute=1))
    both = [world.accounts, Accounts(tmp_path, clock=world.clock, now=lambda: 1.8e9)]
    for number, accounts in enumerate(both):
        clock[0] += FRESH_NS + 1
        found = await accounts.find(key)
        meter = accounts.meter(found)
        assert meter is not None
        meter.enter()
        with pytest.raises(RateLimitError):
            accounts.meter(found).enter()  # type: ignore[union-attr]
        meter.begin("m")
        if number == 0:
            meter.reserve(40, 40)
            meter.end(40, 0, 40)
            await accounts.flush()
        else:
            with pytest.raises(BudgetError, match="20 are left"):
                meter.reserve(20, 1)
            meter.end(0, 0, 0)
        meter.leave()
    for accounts in both:
        await accounts.close()


def meter_of(limits: Limits, tmp_path: Path) -> tuple[Meter, Standing]:
    accounts = Accounts(tmp_path, clock=lambda: 0, now=lambda: 1.8e9)
    account = Account(id="key-1", name="k", tenant="t", hint="rw-", created=0, limits=limits)
    standing = accounts._standings[account.id] = Standing(account, 0)
    meter = accounts.meter(account)
    assert meter is not None
    return meter, standing


async def test_an_answer_without_a_bound_takes_what_answers_have_been_like(tmp_path: Path) -> None:
    meter, standing = meter_of(Limits(tokens_per_minute=1000), tmp_path)
    meter.begin("m")
    meter.reserve(100, None)
    assert (b"x-ratelimit-remaining-tokens", b"%d" % (900 - FIRST_GUESS)) in meter.headers()
    meter.end(100, 0, 1200)  # much longer than thought: a debt
    assert standing.expected == 1200
    assert (b"x-ratelimit-remaining-tokens", b"0") in meter.headers()
    assert (b"x-ratelimit-reset-tokens", b"1m18s") in meter.headers()
    meter.begin("m")
    with pytest.raises(TokenLimitError) as caught:
        meter.reserve(10, None)
    assert caught.value.retry_after == pytest.approx(
        78.0
    )  # never refused for good: it asks for no more than there can be


async def test_the_sequences_of_a_request_are_let_in_together_or_not_at_all(tmp_path: Path) -> None:
    meter, _ = meter_of(Limits(tokens_per_minute=1000), tmp_path)
    meter.begin("m")
    for _ in range(3):
        meter.reserve(100, 200)
    with pytest.raises(TokenLimitError) as caught:
        meter.reserve(100, 200)
    assert caught.value.retry_after is None, "1200 tokens never fit, however long one waits"
    meter.end(0, 0, 0)
    assert (b"x-ratelimit-remaining-tokens", b"1000") in meter.headers()


def test_what_can_never_be_let_in_says_so(tmp_path: Path) -> None:
    meter, _ = meter_of(Limits(tokens_per_minute=1000, max_prompt_tokens=500, models=("a", "b")), tmp_path)
    with pytest.raises(UnknownModelError, match=r"`c` does not exist or you do not have access.*a, b"):
        meter.begin("c")
    with pytest.raises(ContextLengthError, match=r"500 tokens.*501"):
        meter.reserve(501, 1)
    with pytest.raises(TokenLimitError) as caught:
        meter.reserve(500, 501)
    assert caught.value.retry_after is None


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0ms"), (1, "1ms"), (120_000_000, "120ms"), (SECOND, "1s"), (1_500_000_000, "1.5s"), (360 * SECOND, "6m0s"),
        (3600 * SECOND, "1h0m0s"), (3_725_040_000_000, "1h2m5.04s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(nanoseconds: int, text: str) -> None:
    assert seconds(nanoseconds) == text
