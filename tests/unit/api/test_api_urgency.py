"""Who waits for an answer, in the ways in which requests say it."""

from __future__ import annotations

import pytest

from ropeway.api.errors import HttpError
from ropeway.api.urgency import TIERS, WORDS, from_header, in_background, place_of, said
from ropeway.contract import Urgency

HIGH, MEDIUM, LOW = Urgency


def test_the_header_has_three_words() -> None:
    assert from_header(b"") is None
    assert [from_header(word) for word in (b"high", b"MEDIUM", b" low ")] == [HIGH, MEDIUM, LOW]
    for wrong in (b"urgent", b"1", b"high, low", b"\xff"):
        with pytest.raises(HttpError) as refused:
            from_header(wrong)
        assert (refused.value.status, refused.value.param) == (400, "x-ropeway-priority")


def test_the_header_wins_over_the_word_and_the_word_over_the_tier() -> None:
    assert said(LOW, "high", "priority") is LOW
    assert said(None, "medium", "priority") is MEDIUM
    assert said(None, 3, "flex") is MEDIUM
    assert said(None, None, "batch") is LOW
    assert said(None, -1, "auto") is None


def test_nobody_waits_for_what_is_deferred() -> None:
    assert in_background(None) is MEDIUM
    assert in_background(HIGH) is MEDIUM
    assert in_background(None, "low") is LOW
    assert [in_background(None, None, tier) for tier in sorted(TIERS)] == [
        LOW if tier == "batch" else MEDIUM for tier in sorted(TIERS)
    ]
    assert set(WORDS) == {"high", "medium", "low"}


def test_a_word_is_no_place_in_the_line() -> None:
    assert [place_of(given) for given in (None, -7, 0, "low")] == [None, -7, 0, None]
