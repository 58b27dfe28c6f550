"""The cost report: numbers that can be checked by hand, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ropeway.accounts.cost import WAYS, Assumptions, report
from ropeway.errors import ConfigError

GIVEN = Assumptions(tokens_per_day=100e6, hour_price=2.0, pace=2000.0, input_price=1.0, output_price=3.0, once=500.0)


def test_a_day_by_hand() -> None:
    """100 million tokens, a quarter of them written, cost 0.75 + 0.75 a million: 150 a day. A machine computes 172.8
    million a day."""
    made = report(GIVEN)
    found = {(one.where, one.way): one for one in made.scenarios}
    assert [(one.where, one.way) for one in made.scenarios[:3]] == [("provider", way) for way in WAYS]
    assert found["provider", "streaming"].per_day == pytest.approx(150.0)
    assert found["provider", "batch"].per_day == pytest.approx(75.0)
    assert found["provider", "hybrid"].per_day == pytest.approx(150 * (0.3 + 0.7 * 0.5))
    streaming, batch, hybrid = (found["machine", way] for way in WAYS)
    assert (streaming.machines, streaming.hours, streaming.per_day) == (2, 48, 96.0)  # 3 x 100 of 172.8 million
    assert (batch.machines, batch.hours, batch.per_day) == (1, 14, 28.0)  # 13.9 hours at full pace
    assert (hybrid.machines, hybrid.hours, hybrid.per_day) == (1, 24, 48.0)  # 90 of 172.8 million at its peak; 70 fit
    assert hybrid.per_month == 48.0 * 30
    assert made.saving(hybrid) == pytest.approx(1 - 48 / 150)
    assert made.payback_days(hybrid) == pytest.approx(500 / 102)
    assert made.cheapest is batch
    assert made.even == pytest.approx(48 / 1.5 * 1e6)


def test_the_articles_numbers() -> None:
    """A million tokens a day at 8.00 and at 0.42 for a million: 240 and 12.60 a month, which saves 95 %."""
    dear, cheap = (
        report(Assumptions(tokens_per_day=1e6, hour_price=2.0, pace=1000.0, input_price=p, output_price=p)).reference
        for p in (8.0, 0.42)
    )
    assert (dear.per_month, cheap.per_month) == (pytest.approx(240.0), pytest.approx(12.6))
    assert 1 - cheap.per_month / dear.per_month == pytest.approx(0.9475)


POSITIVE = st.floats(0.001, 1e6)


@given(
    given=st.builds(
        Assumptions, tokens_per_day=st.floats(1, 1e12), hour_price=POSITIVE, pace=st.floats(0.1, 1e7),
        input_price=POSITIVE, output_price=POSITIVE, written=st.floats(0, 1), peak=st.floats(1, 100),
        waiting=st.floats(0, 1), batch_discount=st.floats(0, 1), once=st.floats(0, 1e6),
    )
)  # fmt: skip
def test_what_holds_for_every_report(given: Assumptions) -> None:
    made = report(given)
    for where in ("provider", "machine"):
        streaming, batch, hybrid = (made.find(where, way) for way in WAYS)
        assert batch.per_day <= streaming.per_day * (1 + 1e-9)
        assert batch.per_day * (1 - 1e-9) <= hybrid.per_day + given.hour_price  # hours are whole
        if where == "provider":
            assert hybrid.per_day <= streaming.per_day * (1 + 1e-9)
    for one in made.scenarios:
        assert one.per_million == pytest.approx(one.per_day / given.tokens_per_day * 1e6)
        assert made.cheapest.per_day <= one.per_day
        if one.where == "machine":
            assert one.hours * 3600 * given.pace >= given.tokens_per_day * (1 - 1e-6), "nobody computes for nothing"
            assert one.machines * 24 >= one.hours
    assert made.payback_days(made.reference) == 0.0
    assume(made.even is not None and made.even < 1e17)
    at = replace(given, tokens_per_day=made.even, waiting=1.0)
    assert report(at).reference.per_day == pytest.approx(given.hour_price * 24)


@pytest.mark.parametrize(
    "wrong", [{"pace": 0.0}, {"tokens_per_day": 0.0}, {"written": 1.1}, {"peak": 0.5}, {"hour_price": float("nan")}]
)
def test_numbers_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        report(replace(GIVEN, **wrong))
