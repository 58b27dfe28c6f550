"""What each verb of the memory does to its tiers, block by block; that answers stay right is tested elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from invariants import check_pool
from ropeway.contract import BlockCopy, Pinned, Row, StepPlan, StepResult, Tier, TierStats
from ropeway.errors import RequestError
from ropeway.kv import Memory

HOST, DISK = Tier("host", 2), Tier("disk", 3, lasting=True)


def names(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def memory(*tiers: Tier, blocks: int = 4, **more: Any) -> Memory:
    return Memory(blocks, 4, tiers, **{"mode": "swap", **more})


def hold(made: Memory, text: str, owner: str = "") -> list[int]:
    """Compute the blocks that the letters name, and hold them."""
    blocks = made.pool.alloc(len(text))
    assert blocks is not None
    for block, key in zip(blocks, names(text), strict=True):
        made.publish(block, key, owner)
    return blocks


def leave(made: Memory, text: str) -> None:
    """Compute these and let them be remembered."""
    made.pool.release(hold(made, text))


def moves(made: Memory) -> list[tuple[str, str, str]]:
    """The copies that the next plan takes: source, target and name."""
    for shelf in made.shelves:
        check_pool(shelf.pool)
    return [(copy.source_tier, copy.target_tier, copy.key.decode()) for copy in made.take_copies()]


def test_what_is_driven_out_goes_one_tier_down_and_then_another() -> None:
    made = memory(HOST, Tier("far", 3))
    leave(made, "abcd")
    assert moves(made) == []
    leave(made, "ef")  # d and c are the least valuable
    assert moves(made) == [("device", "host", "d"), ("device", "host", "c")]
    leave(made, "g")
    assert moves(made) == [("host", "far", "d"), ("device", "host", "b")]
    assert made.beneath(names("abcdefg"), again=False) == 7
    assert made.stats() == [TierStats("host", 2, 2, 0), TierStats("far", 3, 1, 0)]


def test_a_copy_goes_where_the_content_was_put() -> None:
    made = memory(HOST)
    leave(made, "abcd")
    source = made.pool.find(b"d")
    leave(made, "e")
    assert made.take_copies() == [BlockCopy(source, made.lower[0].pool.find(b"d"), "device", "host", b"d")]  # type: ignore[arg-type]
    assert made.take_copies() == []


def test_what_is_there_already_is_not_copied_but_stays_longer() -> None:
    made = memory(HOST, blocks=1)
    for text in "abac":  # a goes down, comes again, and is driven out again
        leave(made, text)
    assert moves(made) == [("device", "host", "a"), ("device", "host", "b")]
    leave(made, "d")  # one must go for c: a came first, but has been asked for once more
    assert moves(made) == [("device", "host", "c")]
    assert made.lower[0].pool.find(b"a") is not None
    assert made.lower[0].pool.find(b"b") is None


def test_a_tier_all_of_whose_blocks_are_read_takes_nothing() -> None:
    made = memory(HOST, blocks=2)
    leave(made, "ab")
    leave(made, "cd")
    made.take_copies()
    below = made.lower[0].pool
    below.share(range(2))
    leave(made, "e")
    assert moves(made) == []
    assert below.find(b"d") is None


def test_a_lasting_tier_gets_all_that_is_published_at_once() -> None:
    made = memory(HOST, DISK)
    leave(made, "ab")
    assert moves(made) == [("device", "disk", "a"), ("device", "disk", "b")]
    leave(made, "a")  # the same content again is no news
    assert moves(made) == []


def test_what_comes_back_is_held_and_may_not_be_driven_out_by_coming() -> None:
    made = memory(Tier("host", 4), blocks=2)
    leave(made, "ab")
    leave(made, "cd")
    made.take_copies()
    table = made.bring(names("ab"), "owner")
    assert [made.pool.names[block] for block in table] == names("ab")
    assert [made.pool.holders[block] for block in table] == [1, 1]
    assert [made.pool._owner[block] for block in table] == ["owner"] * 2
    down = [("device", "host", "d"), ("host", "device", "a"), ("device", "host", "c"), ("host", "device", "b")]
    assert moves(made) == down
    assert made.lower[0].hits == 2
    assert made.lower[0].pool.available == 4, "what was read is nobody's again"


def test_what_is_found_on_the_device_is_shared_and_not_moved() -> None:
    made = memory(Tier("host", 4), blocks=3)
    leave(made, "abc")
    leave(made, "d")  # c goes down
    made.take_copies()
    table = made.bring(names("ac"), "")
    assert table[0] == made.pool.find(b"a")
    assert moves(made) == [("device", "host", "b"), ("host", "device", "c")]
    assert made.lower[0].hits == 1
    held = made.pool.alloc(1)
    assert held is not None
    with pytest.raises(RuntimeError, match="a block was promised for the content 62 but none is free"):
        made.bring(names("b"), "")


def test_each_tier_gets_back_what_was_read_from_it() -> None:
    made = memory(Tier("host", 2), Tier("far", 2), blocks=4)
    for text in ("abcd", "efgh"):  # the second drives out the first, and its end two tiers down
        leave(made, text)
    made.take_copies()
    held = made.bring(names("abcd"), "")
    assert sorted((source, key) for source, target, key in moves(made) if target == "device") == [
        ("far", "c"), ("far", "d"), ("host", "a"), ("host", "b"),
    ]  # fmt: skip
    assert [made.pool.names[block] for block in held] == names("abcd")
    assert [shelf.hits for shelf in made.lower] == [2, 2]
    assert [shelf.pool.used for shelf in made.lower] == [0, 0]


def test_only_an_unbroken_beginning_can_be_brought_back() -> None:
    made = memory(Tier("host", 4), blocks=2)
    leave(made, "ab")
    leave(made, "c")
    assert made.beneath(names("abzc"), again=False) == 2
    assert made.beneath(names("zab"), again=False) == 0
    assert made.beneath([], again=False) == 0
    assert memory(blocks=2).beneath(names("a"), again=False) == 0


@pytest.mark.parametrize(("mode", "again", "found"), [
    ("swap", False, 1), ("swap", True, 1), ("recompute", False, 1), ("recompute", True, 0), ("auto", True, 1),
])  # fmt: skip
def test_who_may_have_what_lies_beneath(mode: str, again: bool, found: int) -> None:
    made = memory(HOST, blocks=1, mode=mode)
    leave(made, "a")
    leave(made, "b")
    assert made.beneath(names("a"), again=again) == found


def plan(*counts: int, copies: tuple[BlockCopy, ...] = ()) -> StepPlan:
    return StepPlan(1, [], [], [Row(i, 1, i, 0, count, True, []) for i, count in enumerate(counts)], [*copies])


def test_times_of_copies_and_of_tokens_are_means_that_fade() -> None:
    made = memory(HOST, mode="auto")
    [shelf] = made.lower
    read, write = BlockCopy(0, 0, "host", "device"), BlockCopy(0, 0, "device", "host")
    made.learn(plan(10, copies=(read, write)), StepResult(1, [[]], seconds=0.9, copy_seconds=[0.1, 0.3]))
    assert (shelf.read, shelf.write) == (0.1, 0.3)
    assert made._token_seconds == pytest.approx(0.05)
    made.learn(plan(10, copies=(read, write)), StepResult(2, [[]], seconds=1.6, copy_seconds=[0.2, 0.4]))
    assert shelf.read == pytest.approx(0.9 * 0.1 * 0.999 + 0.1 * 0.2)
    assert shelf.write == pytest.approx(0.9 * 0.3 * 0.999 + 0.1 * 0.4)
    assert made._token_seconds == pytest.approx(0.9 * 0.05 + 0.1 * 0.1)


def test_a_step_may_keep_the_times_of_its_copies_to_itself() -> None:
    made = memory(HOST, mode="auto")
    [shelf] = made.lower
    read, write = BlockCopy(0, 0, "host", "device"), BlockCopy(0, 0, "device", "host")
    made.learn(plan(10, copies=(read, write)), StepResult(1, [[]], seconds=0.5))
    assert (shelf.read, shelf.write) == (0, 0)
    assert made._token_seconds == pytest.approx(0.05)


def test_only_steps_that_read_a_block_of_a_prompt_tell_what_that_costs() -> None:
    made = memory(HOST, mode="auto")
    made.learn(plan(1, 1, 3), StepResult(1, [[]], seconds=1.0))
    assert made._token_seconds == 0, "two that stream and less than a block beside them"
    made.learn(plan(1, 1, 5), StepResult(2, [[]], seconds=1.4))
    assert made._token_seconds == pytest.approx(0.2)
    plain = memory(mode="auto")
    plain.learn(plan(50), StepResult(1, [[]], seconds=1.0))
    assert plain._token_seconds == 0, "without tiers nobody asks"


def test_content_is_moved_while_that_is_faster_than_computing_it() -> None:
    made = Memory(1, 4, [HOST])  # as it is unless one says otherwise
    [shelf] = made.lower
    made._token_seconds = 0.01  # a block of four takes 40 ms
    for read, write, spills in ((0.019, 0.02, True), (0.02, 0.02, False), (0.03, 0.0, True)):
        shelf.read, shelf.write = read, write
        leave(made, "a")
        leave(made, "b")
        assert bool(made.take_copies()) == spills
        made.forget(names("ab"))
    leave(made, "a")
    leave(made, "b")
    for read, found in ((0.039, 1), (0.04, 0), (0.0, 1)):
        shelf.read = read
        assert made.beneath(names("a"), again=False) == found
    made.mode = "swap"
    shelf.read = 9.0
    assert made.beneath(names("a"), again=False) == 1


def test_void_content_is_nowhere_any_more_and_a_lasting_tier_is_told() -> None:
    made = memory(Tier("host", 4), DISK, blocks=2)
    leave(made, "ab")
    leave(made, "c")
    made.take_copies()
    slot = made.lower[1].pool.find(b"b")
    made.forget(names("bx"))
    assert made.take_copies() == [BlockCopy(0, slot, "device", "disk", b"")]  # type: ignore[arg-type]
    assert made.beneath(names("b"), again=False) == 0
    assert made.beneath(names("ac"), again=False) == 2
    assert all(shelf.pool.find(b"b") is None for shelf in made.shelves)


def test_owners_quotas_hold_in_every_tier_and_without_a_cache_nothing_is_kept() -> None:
    made = memory(Tier("host", 4), blocks=2, quota=0.5)
    assert [shelf.pool._quota for shelf in made.shelves] == [1, 2]
    off = memory(Tier("host", 4), blocks=1, remember=False)
    leave(off, "a")
    leave(off, "b")
    assert (moves(off), off.beneath(names("a"), again=False)) == ([], 0)


def test_what_a_tier_has_brought_over_is_found() -> None:
    made = memory(Tier("disk", 4, lasting=True, kept=[(3, b"k")]))
    assert made.beneath(names("k"), again=False) == 1
    made.bring(names("k"), "")
    assert [(copy.source, copy.source_tier) for copy in made.take_copies()] == [(3, "disk")]


# Pinned prefixes


def test_a_pin_holds_what_is_there_and_what_comes() -> None:
    made = memory(blocks=16)
    leave(made, "a")
    made.pins.add("p", names("ab"), 16)
    assert made.pool.used == 1
    assert made.pins.listing(4) == [Pinned("p", 8, 2, 1)]
    leave(made, "b")
    assert made.pool.used == 2
    assert made.pins.listing(4) == [Pinned("p", 8, 2, 2)]
    leave(made, "cdefghijklmnopqrstuvwxyz"[:14])
    leave(made, "0123456789ABCD")
    assert made.pool.match(names("ab")) != []
    assert made.pins.remove("p")
    assert made.pool.used == 0
    assert not made.pins.remove("p")


def test_pins_share_what_is_common_and_give_up_the_rest() -> None:
    made = memory(blocks=32)
    leave(made, "abcd")
    made.pins.add("p", names("abc"), 32)
    made.pins.add("q", names("abd"), 32)
    assert (made.pins.reserved, made.pool.used) == (4, 4)
    made.pins.remove("p")
    assert (made.pins.reserved, made.pool.used) == (3, 3)
    made.pins.add("q", names("a"), 32)  # another prefix in its place
    assert (made.pins.reserved, made.pool.used) == (1, 1)
    assert made.pool.holders[made.pool.match(names("a"))[0]] == 1


def test_a_quarter_may_be_pinned_and_no_more_than_requests_leave() -> None:
    made = memory(blocks=16)
    made.pins.add("p", names("abcd"), 4)
    with pytest.raises(RequestError, match="this prefix of 1 KV blocks, 5 would be pinned, but at most 4 of 16"):
        made.pins.add("q", names("e"), 16)
    assert made.pins.listing(4) == [Pinned("p", 16, 4, 0)]
    made.pins.add("p", names("efgh"), 4)  # in the place of what it was
    with pytest.raises(
        RequestError, match=r"but open requests leave 3\. Unpin another prefix, or try again later"
    ) as no:
        made.pins.add("p", names("abcd"), 3)
    assert no.value.param == "prompt"
    with pytest.raises(RequestError, match=r"but at most 4 of 16\. Unpin another prefix\.$"):
        made.pins.add("q", names("a"), 4)  # requests leave as much
    with pytest.raises(RequestError, match=r"^The prefix is shorter than one KV block") as short:
        made.pins.add("s", [], 16)
    assert short.value.param == "prompt"


def test_void_content_leaves_its_pin_which_takes_it_again_when_it_is_right() -> None:
    made = memory(blocks=16)
    made.pins.add("p", names("ab"), 16)
    leave(made, "ab")
    made.forget(names("bz"))
    assert made.pool.used == 1
    assert made.pins.listing(4) == [Pinned("p", 8, 2, 1)]
    made.forget(names("b"))
    leave(made, "b")
    assert made.pool.used == 2
