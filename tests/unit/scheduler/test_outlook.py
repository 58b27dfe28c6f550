"""When the waiting will board: played through by hand, for each of the things that they can wait for."""

from __future__ import annotations

from typing import Any

import pytest
from desk import LOW, Foreseen, sequence

from ropeway.scheduler import Forecast, Resources
from ropeway.scheduler.outlook import Outlook


def outlook(to_go: dict[int, int] | None = None, *, cached: int = 0, step: float = 0.5, **changes: Any) -> Outlook:
    """One that has seen steps of `step` seconds, where `cached` tokens of everybody's prompt are cached."""
    fields: dict[str, Any] = {"num_blocks": 1000, "block_size": 4, "slots": 2, "max_model_len": 4096}
    resources = Resources(**fields | {"max_step_tokens": 64} | changes)
    made = Outlook(resources, Foreseen(lambda number: (to_go or {}).get(number, 10)), lambda seq: cached)
    for moment in range(3):
        made.stepped(moment * step)
    return made


def test_nothing_is_foretold_before_a_step_has_been_seen() -> None:
    fresh = Outlook(outlook()._resources, Forecast(), lambda seq: 0)
    assert fresh.foretell([], [sequence(1, 8)], 64, 0.0) == []
    fresh.stepped(1.0)
    assert fresh.foretell([], [sequence(1, 8)], 64, 1.0) == []
    fresh.idle()
    fresh.stepped(9.0)  # the pause between is no step
    assert fresh.foretell([], [sequence(1, 8)], 64, 9.0) == []
    fresh.stepped(9.25)
    assert fresh.foretell([], [sequence(1, 8), sequence(2, 8)], 8, 9.25) == [0.0, 0.25]


def test_a_seat_is_free_when_the_first_of_those_on_board_is_done() -> None:
    riding = [sequence(1, 1), sequence(2, 1)]
    for seq in riding:
        seq.computed = 1
    foretold = outlook({1: 30, 2: 7, 3: 5, 4: 20, 5: 1}).foretell(
        riding, [sequence(n, 1) for n in (3, 4, 5)], 1 << 20, 0.0
    )
    # The second leaves after 7 steps and the third 5 later; then the fourth has 20 to go, and the first 18 left.
    assert foretold == pytest.approx([3.5, 6.0, 15.0], abs=1e-4)


def test_a_place_in_memory_is_free_when_enough_have_left() -> None:
    riding = [sequence(1, 8), sequence(2, 8)]
    for seq in riding:
        seq.computed = 8
    riding[0].shared = 1
    # By half of their answers they hold 8 + 10 // 2 tokens in 4 blocks, of which one is shared, and 8 + 20 // 2 in 5.
    made = outlook({1: 10, 2: 20, 3: 8, 4: 8}, slots=9, num_blocks=10)
    # Two blocks are free and each of these needs 3: one waits for the first to leave, the other for the one.
    assert made.foretell(riding, [sequence(3, 8), sequence(4, 8)], 1 << 20, 0.0) == pytest.approx([5.0, 9.0], abs=1e-4)
    roomy = outlook({1: 10, 2: 20, 3: 8, 4: 8}, slots=9, num_blocks=11)
    assert roomy.foretell(riding, [sequence(3, 8), sequence(4, 8)], 1 << 20, 0.0) == pytest.approx([0.0, 4.0], abs=1e-4)


def test_who_needs_more_than_there_is_boards_when_all_is_free() -> None:
    riding = [sequence(1, 1)]
    made = outlook({1: 6, 2: 400}, num_blocks=10)
    assert made.foretell(riding, [sequence(2, 8)], 1 << 20, 0.0) == pytest.approx([3.0], abs=1e-4)


def test_prompts_are_read_one_after_the_other() -> None:
    riding = [sequence(1, 41)]  # 40 of whose tokens come before the one that yields a token
    made = outlook(slots=9, cached=8)
    foretold = made.foretell(riding, [sequence(2, 28), sequence(3, 48), sequence(4, 8)], 20, 0.0)
    assert foretold == pytest.approx([40 / 20 * 0.5, 60 / 20 * 0.5, 100 / 20 * 0.5])


def test_a_prompt_is_read_from_when_its_seat_is_free() -> None:
    riding = [sequence(1, 1)]
    made = outlook({1: 10, 2: 4}, slots=1)
    # It boards at step 10, reads for two steps, and answers for four.
    assert made.foretell(riding, [sequence(2, 40), sequence(3, 1)], 20, 0.0) == pytest.approx([5.0, 8.0])


def test_who_rides_and_still_reads_leaves_later() -> None:
    made = outlook({1: 10}, slots=1)
    # It reads for two steps, and answers for ten.
    assert made.foretell([sequence(1, 41)], [sequence(2, 1)], 20, 0.0) == pytest.approx([6.0])


def test_a_static_batch_boards_when_the_last_one_has_ended() -> None:
    riding = [sequence(1, 1), sequence(2, 1)]
    line = [sequence(3, 1), sequence(4, 1), sequence(5, 1)]
    made = outlook({1: 30, 2: 7, 3: 5, 4: 20, 5: 1}, static_batching=True)
    assert made.foretell(riding, line, 1 << 20, 0.0) == pytest.approx([15.0, 15.0, 25.0], abs=1e-4)


def test_what_was_foretold_is_judged_when_it_comes_and_mends_what_is_foretold_next() -> None:
    made = outlook({1: 10, 2: 4}, slots=1)
    first, second = sequence(2, 1), sequence(3, 1)
    assert made.error is None
    assert made.foretell([sequence(1, 1)], [first, second], 1 << 20, 1.0) == pytest.approx([5.0, 7.0], abs=1e-4)
    made.foretell([sequence(1, 1)], [second], 1 << 20, 3.0)  # what was said first counts
    made.boards(first, 11.0)  # after 10 s instead of 5
    assert made.error == pytest.approx(0.5, abs=1e-4)
    made.boards(second, 15.0)  # after 14 s instead of 7
    assert made.error == pytest.approx(0.5, abs=1e-4)
    assert made.foretell([sequence(1, 1)], [sequence(4, 1)], 1 << 20, 20.0) == pytest.approx([10.0], rel=1e-3)
    made.boards(sequence(9, 1), 99.0)  # of whom nothing was foretold
    assert made.error == pytest.approx(0.5, abs=1e-4)


def test_what_was_foretold_at_the_moment_of_boarding_or_to_background_work_is_not_judged() -> None:
    made = outlook({1: 10}, slots=1)
    now, low, gone = sequence(2, 1), sequence(3, 1, urgency=LOW), sequence(4, 1)
    made.foretell([sequence(1, 1)], [now, low, gone], 1 << 20, 1.0)
    made.boards(now, 1.0)
    made.boards(low, 9.0)
    made.leaves(gone)
    made.leaves(gone)
    made.boards(gone, 9.0)
    assert made.error is None
    assert not made._foretold


def test_a_wild_guess_moves_what_is_foretold_by_ten_times_at_most() -> None:
    for came, factor in ((1000.0, 10.0), (1.01, 0.1)):
        made = outlook({1: 10}, slots=1)
        one = sequence(2, 1)
        made.foretell([sequence(1, 1)], [one], 1 << 20, 1.0)
        made.boards(one, came)
        assert made.foretell([sequence(1, 1)], [sequence(3, 1)], 1 << 20, 0.0) == pytest.approx(
            [5.0 * factor], rel=1e-3
        )


def test_a_wait_where_none_was_foretold_counts_as_a_wild_guess() -> None:
    made, one = outlook({1: 10}, slots=1), sequence(2, 1)
    assert made.foretell([], [one], 1 << 20, 1.0) == [0.0]
    made.boards(one, 4.0)
    assert made.foretell([sequence(1, 1)], [sequence(3, 1)], 1 << 20, 5.0) == pytest.approx([50.0], rel=1e-3)


def test_errors_of_long_ago_fade() -> None:
    made = outlook({1: 10}, slots=1)
    for number in range(2, 300):
        one = sequence(number, 1)
        [told] = made.foretell([sequence(1, 1)], [one], 1 << 20, 0.0)
        made.boards(one, 20.0 if number < 20 else told)
    assert made.error == pytest.approx(0.0, abs=0.01)
