"""Circuits and budgets of retries, on a clock of the test's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ropeway.gateway.breaker import ENOUGH, MOST_REST, REST, STREAK, WINDOW, Breaker, Recent, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def use(breaker: Breaker, *failed: bool | None) -> None:
    for one in failed:
        assert breaker.passes
        breaker.end(breaker.begin(), one)


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    use(breaker, *[True] * STREAK)
    assert breaker.state == "open"
    return breaker


def test_failures_in_a_row_open_it_and_a_success_in_between_does_not() -> None:
    breaker = Breaker(Clock())
    use(breaker, *[True] * (STREAK - 1), False, *[True] * (STREAK - 1))
    assert breaker.state == "closed"
    use(breaker, True)
    assert breaker.state == "open"
    assert not breaker.passes
    assert f"{STREAK} failures in a row" in breaker.reason


def test_half_of_many_failing_opens_it_and_what_is_old_does_not_count() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    use(breaker, *[True, False] * (ENOUGH // 2 - 1))
    clock.now += 2 * WINDOW
    use(breaker, *[True, False] * (ENOUGH // 2 - 1), True)
    assert breaker.state == "closed"
    use(breaker, True)
    assert breaker.state == "open"


def test_one_request_tries_it_and_what_becomes_of_it_decides() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += REST - 0.01
    assert not breaker.passes
    assert breaker.retry_after == 1.0
    clock.now += 0.01
    assert breaker.state == "half_open"
    probe = breaker.begin()
    assert not breaker.passes  # one is enough
    breaker.end(probe, None)  # its client has left, so another one may try
    use(breaker, True)
    assert breaker.state == "open"
    clock.now += REST
    assert breaker.state == "open"  # twice as long
    clock.now += REST
    use(breaker, False)
    assert breaker.state == "closed"
    assert breaker.reason == ""


def test_rests_grow_to_a_bound() -> None:
    clock = Clock()
    breaker = opened(clock)
    for _ in range(12):
        clock.now += MOST_REST
        use(breaker, True)
    assert breaker.retry_after == MOST_REST


def test_what_was_sent_before_it_opened_says_nothing_later() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    late = [breaker.begin() for _ in range(10)]
    use(breaker, *[True] * STREAK)
    until = breaker.retry_after
    for life in late[:5]:
        breaker.end(life, True)
    assert breaker.retry_after == until
    clock.now += REST
    breaker.end(late[5], False)
    assert breaker.state == "half_open"  # only the probe closes it


def test_an_outlier_is_ejected_only_if_others_do_better() -> None:
    clock = Clock()
    bad, good, also_bad = Breaker(clock), Breaker(clock), Breaker(clock)
    use(good, *[False] * ENOUGH)
    for one in (bad, also_bad):
        use(one, *[False, False, False, True] * (ENOUGH // 4))
    bad.eject([also_bad])
    assert bad.state == "closed"
    bad.eject([good])
    assert bad.state == "open"
    assert "elsewhere" in bad.reason
    also_bad.eject([bad])  # which is gone: nobody is left to compare with
    assert also_bad.state == "closed"


@given(st.lists(st.booleans(), max_size=500))
def test_retries_are_a_fifth_of_the_requests_and_a_few(wanted: list[bool]) -> None:
    budget, retries = RetryBudget(), 0
    for number, want in enumerate(wanted, 1):
        budget.request()
        retries += want and budget.take()
        assert retries <= 0.2 * number + 3 + 1e-9


def test_savings_lapse() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.request()
    assert sum(budget.take() for _ in range(100)) == 10


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_recent_counts_the_last_seconds(steps: list[tuple[float, bool]]) -> None:
    recent, now, kept = Recent(10.0), 50.0, []
    for wait, failed in steps:
        now += wait
        recent.add(now, failed)
        kept.append((now, failed))
        total, wrong = recent.counts(now)
        surely = [f for at, f in kept if at > now - 9.0]
        perhaps = [f for at, f in kept if at > now - 10.0 - 1e-6]
        assert len(surely) <= total <= len(perhaps)
        assert sum(surely) <= wrong <= sum(perhaps)
