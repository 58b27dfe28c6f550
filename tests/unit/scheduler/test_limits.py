"""Each limit alone: how many tokens it allows to whom, and what it says that it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from desk import LOW, Foreseen, sequence

from ropeway.contract import Urgency
from ropeway.kv import BlockPool
from ropeway.scheduler import Resources
from ropeway.scheduler.limits import ANYBODY, BlockLimit, Limits, SharedPrefix, SlotLimit, StaticBatch, TokenLimit
from ropeway.scheduler.sequence import Sequence, State


def riding(pool: BlockPool, number: int, prompt: int = 8, answer: int = 999, shared: int = 0) -> Sequence:
    seq = sequence(number, prompt, answer)
    seq.blocks = pool.alloc(-(-prompt // 4)) or []
    seq.shared = shared
    seq.move(State.RUNNING)
    return seq


# Tokens


def test_a_step_s_tokens_are_shared_out_in_parts_or_whole() -> None:
    for in_parts, over in ((True, 7), (False, 0)):
        limit = TokenLimit(in_parts)
        limit.fill(10, 3)
        assert [limit.cap(sequence(prompt=8), want) for want in (6, 7, 8)] == [6, 7, over]
        limit.fill(10)
        assert limit.left == 10
    assert (TokenLimit(True).passes, TokenLimit(False).passes) == (0, 16)


def test_why_a_step_has_no_tokens_left() -> None:
    limit = TokenLimit(True)
    limit.fill(10, 10)
    assert limit.why(sequence(prompt=8)) == "the step's budget of 10 tokens is taken by requests before it"
    assert "of 10 tokens beside interactive requests is" in limit.why(sequence(prompt=8, urgency=LOW))
    whole = TokenLimit(False)
    whole.fill(10, 4)
    seq = sequence(prompt=8)
    seq.computed = 3
    assert whole.why(seq) == "its 5 tokens must run in one step, which has 6 left"


# Seats


def test_seats_are_taken_from_the_first_on_and_the_last_kept_for_people() -> None:
    limit = SlotLimit(3, 1)
    seqs = [sequence(number, 8) for number in range(3)]
    low = sequence(9, 8, urgency=LOW)
    allowed = []
    for seq in seqs:
        allowed.append((limit.cap(seq, 5), limit.cap(low, 5)))
        limit.boards(seq)
    assert [seq.slot for seq in seqs] == [0, 1, 2]
    assert allowed == [(5, 5), (5, 5), (5, 0)]
    assert limit.cap(low, 5) == limit.cap(seqs[0], 5) == 0
    limit.leaves(seqs[1])
    assert (seqs[1].slot, limit.free) == (-1, [1])
    assert limit.why(seqs[0]) == "all 3 seats are taken; the next request to finish frees one"
    assert "taken or kept for interactive requests (1);" in limit.why(low)
    assert "kept" not in SlotLimit(3, 0).why(low)


# Blocks


def test_who_is_on_board_may_compute_what_there_is_room_for() -> None:
    pool = BlockPool(4)
    limit, seq = BlockLimit(pool, 4, Foreseen()), riding(pool, 1)
    seq.computed = 7
    assert [limit.cap(seq, want) for want in (9, 10)] == [9, 9], "in its two blocks and the two that are free"


def boarding(blocks: int, *on_board: tuple[int, int, int], reserve: float = 0.0) -> tuple[BlockLimit, BlockPool]:
    """A limit at the beginning of boarding; on board are sequences of (tokens to go, prompt, blocks shared)."""
    pool, forecast = BlockPool(blocks), Foreseen()
    forecast.reserve = reserve
    limit = BlockLimit(pool, 4, forecast)
    limit.begin([riding(pool, number, prompt, shared=shared) for number, prompt, shared in on_board], list)
    return limit, pool


def test_nobody_boards_who_would_not_fit_at_the_peak() -> None:
    # On board: 8 tokens in 3 blocks with the next one, and 20 more steps that need memory. Who comes: the same, and 10.
    # When he is done they hold (12 + 10) + (12 + 10) tokens: 11 blocks.
    for blocks, allowed in ((10, 0), (11, 5)):
        limit, _ = boarding(blocks, (22, 8, 0))
        assert limit.cap(sequence(12, 8), 5) == allowed
    limit, _ = boarding(10, (22, 8, 0))
    assert "it needs 1 KV blocks more than will be free" in limit.why(sequence(12, 8))
    limit, _ = boarding(8, (22, 8, 0))
    assert "it needs 3 KV blocks more" in limit.why(sequence(12, 8))
    for blocks, allowed in ((10, 0), (11, 5)):
        limit, _ = boarding(blocks, (22, 8, 1))
        assert limit.cap(sequence(12, 8), 5) == allowed, "a block that is shared is counted once, whosever it is"


def test_a_share_of_memory_stays_free_for_what_cannot_be_foreseen() -> None:
    for reserve, allowed in ((0.2, 5), (0.3, 0)):
        limit, _ = boarding(14, (22, 8, 0), reserve=reserve)  # 11 of 14 blocks at the peak
        assert limit.cap(sequence(12, 8), 5) == allowed


def test_who_lacks_room_for_the_next_token_waits_whatever_is_expected() -> None:
    limit, pool = boarding(6, (2, 8, 0))
    pool.alloc(2)
    assert limit.cap(sequence(2, 8), 5) == 0, "3 blocks with the next token, and 2 are free"
    assert limit._missing(sequence(2, 8)) == 1


def test_where_all_fit_at_their_longest_nobody_asks_what_is_likely() -> None:
    pool, forecast = BlockPool(8), Foreseen()
    limit = BlockLimit(pool, 4, forecast)
    on_board = [riding(pool, 1, 8, 9)]  # 16 tokens need memory: two blocks more
    limit.begin(on_board, list)
    assert limit._spare == 4
    assert limit.cap(sequence(2, 8, 9), 5) == 5
    assert forecast.surveys == 0
    assert limit.cap(sequence(2, 8, 10), 5) == 5, "a token more needs a block more, and is likely to fit"
    assert forecast.surveys == 1
    assert BlockLimit(pool, 4, Foreseen())._missing(sequence(2, 100, 100)) == 0, "alone whoever passed the door fits"


def test_expectations_are_asked_for_again_when_somebody_left_or_after_so_many_steps() -> None:
    pool, forecast = BlockPool(40), Foreseen()
    limit = BlockLimit(pool, 4, forecast)
    on_board = [riding(pool, 5)]
    for _ in range(limit.RENEW):
        limit.begin(on_board, list)
        limit.cap(sequence(5, 8), 5)
    assert forecast.surveys == 1
    limit.begin(on_board, list)
    limit.cap(sequence(5, 8), 5)
    assert forecast.surveys == 2
    limit.leaves(on_board[0])
    limit.cap(sequence(5, 8), 5)
    assert forecast.surveys == 3


def test_who_boards_counts_at_once() -> None:
    limit, pool = boarding(11, (22, 8, 0))
    first = sequence(12, 8)
    assert limit.cap(first, 5) == 5
    first.blocks = pool.alloc(2) or []
    limit._running = [*limit._running, first]
    limit.boards(first)
    assert limit.cap(sequence(12, 8), 5) == 0


def test_who_boards_counts_to_the_last_step_for_which_expectations_hold() -> None:
    pool, forecast = BlockPool(11), Foreseen()
    forecast.reserve = 0.0
    limit, first = BlockLimit(pool, 4, forecast), sequence(12, 8)
    on_board = [riding(pool, 22)]
    for _ in range(limit.RENEW):
        limit.begin(on_board, list)
        assert limit.cap(first, 5) == 5
    first.blocks = pool.alloc(2) or []
    on_board.append(first)
    limit.boards(first)
    assert limit.cap(sequence(12, 8), 5) == 0
    assert forecast.surveys == 1


# Shared beginnings, and batches


def keyed(number: int, keys: str, blocks: int = 0, urgency: Urgency = Urgency.HIGH) -> Sequence:
    seq = sequence(number, prompt=4 * len(keys) + 1, urgency=urgency)
    seq.keys = [letter.encode() for letter in keys]
    seq.blocks = list(range(blocks))
    seq.computed = 4 * blocks
    return seq


def test_who_shares_a_beginning_that_is_being_computed_waits_for_it() -> None:
    limit, leader = SharedPrefix(4), keyed(1, "abc", blocks=1)
    limit.boards(leader)
    assert limit.cap(keyed(2, "abd"), 5) == 5, "the first block was there before"
    follower = keyed(2, "abd", blocks=1)
    assert limit.cap(follower, 5) == 0
    assert limit.why(follower) == "request 1 computes the beginning of the prompt that both share; then it boards"
    assert limit.cap(keyed(3, "axc", blocks=1), 5) == 5
    short = keyed(4, "ab", blocks=1)
    short.tokens.pop()  # its last token would be in the block: that one it computes itself
    assert limit.cap(short, 5) == 5
    limit.settle(leader, [b"b"])
    assert limit.cap(follower, 5) == 5
    assert limit.cap(keyed(5, "abc", blocks=2), 5) == 0
    limit.settle(follower, [b"c"])  # it is not the follower's
    assert limit.cap(keyed(5, "abc", blocks=2), 5) == 0
    leader.published = 2
    limit.leaves(leader)
    assert not limit._coming


def test_nobody_waits_for_who_is_less_urgent() -> None:
    limit = SharedPrefix(4)
    low, high, other = keyed(1, "ab", urgency=LOW), keyed(2, "ab"), keyed(3, "ab", urgency=LOW)
    limit.boards(low)
    assert limit.cap(high, 5) == 5
    assert limit.cap(other, 5) == 0
    limit.boards(high)
    assert limit._coming == {b"a": high, b"b": high}
    limit.boards(other)
    assert limit._coming == {b"a": high, b"b": high}


def test_a_static_batch_is_whoever_waits_when_one_has_ended() -> None:
    limit = StaticBatch(2)
    line = [sequence(number, 8) for number in range(4)]
    limit.begin([], lambda: line)
    assert [limit.cap(seq, 5) for seq in line] == [5, 5, 0, 0]
    assert limit.why(line[2]) == "batching is static and 2 requests of the running batch have not finished"
    line[0].move(State.FINISHED)
    limit.begin([], lambda: line[2:])
    assert [limit.cap(seq, 5) for seq in line[1:]] == [5, 0, 0]
    line[1].move(State.FINISHED)
    limit.begin([], lambda: line[2:])
    assert [limit.cap(seq, 5) for seq in line[2:]] == [5, 5]


# All of them


def limits(**changes: Any) -> Limits:
    fields: dict[str, Any] = {"num_blocks": 9, "block_size": 4, "slots": 2, "max_model_len": 90, "max_step_tokens": 16}
    return Limits(Resources(**fields | changes), BlockPool(9), Foreseen())


def test_the_smallest_answer_holds_and_its_limit_is_named() -> None:
    made, seq = limits(), sequence(prompt=8)
    made.begin([], list)
    made.tokens.fill(16)
    assert made.cap(seq) == (8, None)
    made.tokens.fill(16, 11)
    assert made.cap(seq) == (5, made.tokens)
    made.slots.free.clear()
    assert made.cap(seq) == (0, made.slots), "seats are asked for first"
    seq.move(State.RUNNING)
    assert made.cap(seq) == (5, made.tokens), "who is on board has one"
    assert made.places == (made.slots, made.blocks)
    made._all[-1]._pool.alloc(9)  # type: ignore[attr-defined]
    for left in (5, 1):
        made.tokens.fill(16, 16 - left)
        assert made.cap(seq) == (0, made.blocks), "who may run some tokens may still lack room for the first"
    held = limits(static_batching=True)
    held.begin([], list)
    assert held.cap(sequence(prompt=8))[1].name == "static-batch"  # type: ignore[union-attr]


def test_who_has_come_to_his_end_has_nothing_to_compute_and_no_limit_to_blame() -> None:
    made, seq = limits(), sequence(prompt=8, answer=2)
    made.begin([], list)
    made.tokens.fill(16)
    seq.move(State.RUNNING)
    seq.computed, seq.known, seq.blocks = 8, 10, [0, 1, 2]
    assert made.cap(seq) == (1, None), "the last token needs no KV"
    seq.computed = 9
    assert made.cap(seq) == (0, None)


@pytest.mark.parametrize(("limit", "name", "aboard", "passes"), [
    ("tokens", "tokens", True, 0), ("slots", "seats", False, 0), ("shared", "shared-prefix", False, ANYBODY),
    ("blocks", "kv-blocks", True, 16),
])  # fmt: skip
def test_limits_are_known_by_name_and_by_whom_they_hold(limit: str, name: str, aboard: bool, passes: int) -> None:
    one = getattr(limits(), limit)
    assert (one.name, one.aboard, one.passes) == (name, aboard, passes)


def test_who_boards_takes_what_was_spare() -> None:
    pool, forecast = BlockPool(8), Foreseen()
    limit = BlockLimit(pool, 4, forecast)
    on_board: list[Sequence] = [riding(pool, 1, 8, 9)]
    limit.begin(on_board, list)
    assert limit._spare == 4
    on_board.append(riding(pool, 2, 8, 9))
    limit.boards(on_board[-1])
    assert limit._spare == 0, "two of its blocks are held, and two it may ask for yet"
