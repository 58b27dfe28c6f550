"""Names, windows and states of durable work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.errors import RequestError
from ropeway.jobs.records import MOVES, BatchState, derived_id, is_id, new_id, window_seconds


@pytest.mark.parametrize("kind", ["file-", "batch_", "batch_req_", "job_"])
def test_ids_are_known_by_their_kind(kind: str) -> None:
    for made in (new_id(kind), derived_id(kind, "a", 1)):
        assert is_id(kind, made)
        assert not any(is_id(other, made) for other in ("file-", "batch_", "batch_req_", "job_") if other != kind)
        for wrong in (made + "\n", made + "/..", made.upper(), made[:-1], "../" + made, made.replace(made[-1], "٣")):
            assert not is_id(kind, wrong)


@given(st.text())
def test_no_other_text_is_an_id(text: str) -> None:
    assert not is_id("file-", text)


def test_derived_ids_tell_their_parts_apart() -> None:
    assert derived_id("file-", "a", "b") == derived_id("file-", "a", "b")
    assert len({derived_id("file-", *parts) for parts in (("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"))}) == 4


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("10s", 10), ("30m", 1800), ("7d", 604800), ("30d", 2592000)]
)
def test_windows(text: str, seconds: int) -> None:
    assert window_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "24", "h", "0h", "-1h", "24H", "1.5h", "9s", "31d", "24h\n", "٢٤h", "1e3s", "9999999s"]
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        window_seconds(text)
    assert refused.value.param == "completion_window"


def test_a_batch_that_makes_its_files_is_past_being_cancelled() -> None:
    before = {state: {one.value for one, after in MOVES.items() if state in after} for state in BatchState}
    assert before[BatchState.CANCELLING] == {"validating", "in_progress"}
    assert before[BatchState.COMPLETED] == {"finalizing"}
    assert before[BatchState.CANCELLED] == {"cancelling"}
    assert before[BatchState.EXPIRED] == {"validating", "finalizing"}


def test_every_batch_can_end_and_no_end_is_left() -> None:
    ends = {state for state in BatchState if state.ended}
    assert ends == {BatchState.FAILED, BatchState.COMPLETED, BatchState.EXPIRED, BatchState.CANCELLED}
    order: list[BatchState] = []

    def visit(state: BatchState, path: tuple[BatchState, ...]) -> None:
        assert state not in path, "a state leads back to itself"
        for following in MOVES[state]:
            visit(following, (*path, state))
        order.append(state)

    visit(BatchState.VALIDATING, ())
    assert set(order) == set(BatchState)
