"""The pool of blocks against its rules written down plainly."""

from __future__ import annotations

from copy import deepcopy
from itertools import count
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_pool import PlainPool

from invariants import check_pool
from ropeway.kv import BlockPool, KeyChain
from ropeway.kv.pool import LEVELS, Age

SIZE = 4
SMALL = {"CREDIT": 3, "PAST": 6}
"""So that credit runs out, and lost names are forgotten, within a few steps."""


class PoolMachine(RuleBasedStateMachine):
    """Tables of blocks as sequences would hold them; contents are written when a block is allocated."""

    @initialize(blocks=st.integers(1, 24), quota=st.sampled_from([1.0, 0.5, 0.2]))
    def start(self, blocks: int, quota: float) -> None:
        self.small = patch.multiple("ropeway.kv.pool", **SMALL)
        self.small.start()
        self.lost: list[tuple[int, bytes, str]] = []
        self.pool = BlockPool(blocks, quota=quota, evicting=lambda *lost: self.lost.append(lost))
        self.plain = PlainPool(blocks, quota, levels=LEVELS, credit=SMALL["CREDIT"], past=SMALL["PAST"])
        self.chain = KeyChain(SIZE, b"secret")
        self.tables: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), owner=st.sampled_from(["", "a", "b", "c"]))
    def board(self, tokens: list[int], owner: str) -> None:
        keys: list[bytes] = []
        self.chain.extend(keys, tokens, "", len(tokens))
        matched = self.pool.match(keys)
        for index, block in enumerate(matched):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        needed = -(-len(tokens) // SIZE) - len(matched)
        if self.pool.available - self.pool.idle(matched) < needed:
            return
        self.pool.share(matched)
        self.plain.share(matched)
        self.lost.clear()
        fresh = self.pool.alloc(needed)
        assert fresh is not None
        assert self.lost == self.plain.alloc(fresh)
        assert {block for block, _, _ in self.lost} <= set(fresh), "only what is handed out is lost"
        assert all(self.pool.find(key) is None for _, key, _ in self.lost)
        assert len(set(fresh) | set(matched)) == len(fresh) + len(matched)
        table = matched + fresh
        for index, block in enumerate(table[len(matched) :], len(matched)):
            self.content[block] = tuple(tokens[: (index + 1) * SIZE])
        for index, key in enumerate(keys):
            assert self.pool.publish(table[index], key, owner) == self.plain.publish(table[index], key, owner)
        self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 1000))
    def leave(self, pick: int) -> None:
        _, table = self.tables.pop(pick % len(self.tables))
        self.pool.release(table)
        self.plain.release(table)

    @rule(tokens=st.lists(st.integers(0, 2), min_size=SIZE, max_size=40))
    def spoil(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        self.chain.extend(keys, tokens, "", len(tokens))
        matched = self.pool.match(keys)
        self.pool.forget(matched)
        self.plain.forget(matched)
        assert self.pool.match(keys) == []

    @rule(pick=st.integers(0, 1000))
    def spoil_one(self, pick: int) -> None:
        """Any block: held or free, with content or without."""
        block = pick % self.pool.num_blocks
        self.pool.forget([block])
        self.plain.forget([block])

    @rule(name=st.binary(min_size=16, max_size=16))
    def keep(self, name: bytes) -> None:
        if self.pool.find(name) is not None:
            return
        room = self.pool.available
        self.lost.clear()
        block = self.pool.keep(name, "z")
        assert (block is None) == (room == 0)
        if block is not None:
            assert self.pool.find(name) == block
            assert self.lost == self.plain.alloc([block])
            assert self.plain.publish(block, name, "z")
            self.plain.blocks[block].holders = 0
            self.plain._put(self.plain.blocks[block])
            self.content[block] = ()
        assert self.pool.available == room

    @rule()
    def too_many(self) -> None:
        assert self.pool.alloc(self.pool.available + 1) is None

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            check_pool(self.pool, [table for _, table in self.tables])
            names = {key: self.pool.find(key) for key in self.plain.content}
            assert {key: (self.pool._owner[b], self.pool._level[b]) for key, b in names.items()} == self.plain.content  # type: ignore[index]
            assert self.pool.remembered == len(names)
            assert self.pool.used == len({block for _, table in self.tables for block in table})

    def teardown(self) -> None:
        if hasattr(self, "small"):
            self.small.stop()


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def _publish(pool: BlockPool, names: str, *owner: str) -> list[int]:
    blocks = pool.alloc(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name.encode(), *owner)
    return blocks


def test_a_chain_loses_its_leaves_before_its_root() -> None:
    pool = BlockPool(4)
    pool.release(_publish(pool, "abcd"))
    for lost in "dcba":
        assert len(pool.match([b"a", b"b", b"c", b"d"])) == "abcd".index(lost) + 1
        pool.alloc(1)
    assert pool.match([b"a"]) == []


def test_blocks_without_content_are_taken_before_remembered_ones() -> None:
    pool = BlockPool(4)
    kept = _publish(pool, "ab")
    plain = pool.alloc(2)
    assert plain is not None
    pool.release(kept)
    pool.release(plain)
    assert set(pool.alloc(2) or ()) == set(plain)
    assert pool.match([b"a", b"b"]) == kept


def test_the_least_recently_released_content_goes_first() -> None:
    pool = BlockPool(2)
    old, new = _publish(pool, "o"), _publish(pool, "n")
    pool.release(old)
    pool.release(new)
    pool.share(old)
    pool.release(old)  # used again: now the newer one
    pool.alloc(1)
    assert pool.match([b"o"]) == old
    assert pool.match([b"n"]) == []


def test_a_shared_block_comes_home_with_its_last_holder() -> None:
    pool = BlockPool(2)
    blocks = _publish(pool, "a")
    pool.share(blocks)
    pool.release(blocks)
    assert pool.available == 1
    pool.release(blocks)
    assert pool.available == 2
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(blocks)


def test_what_was_asked_for_often_outlives_what_came_later() -> None:
    pool = BlockPool(4)
    often = _publish(pool, "o")
    pool.release(often)
    pool.share(often)
    pool.release(often)
    for name in "abcdefgh":
        pool.release(_publish(pool, name))
    assert pool.match([b"o"]) == often


@pytest.mark.parametrize(("asked", "credit", "again"), [(0, 0, 500), (1, 500, 1000), (4, 2000, 2000), (9, 2000, 2000)])
def test_each_time_asked_for_is_worth_500_releases_and_four_times_at_most(asked: int, credit: int, again: int) -> None:
    """Having been lost and come again counts as asked for, on top of the credit from before. See docs/memory.md."""
    pool = BlockPool(2)
    pool.release(_publish(pool, "o"))
    for _ in range(asked):
        pool.share(pool.match([b"o"]))
        pool.release(pool.match([b"o"]))
    assert _outlives(pool, b"o", first=1000) == credit
    pool.release(_publish(pool, "o"))
    assert _outlives(pool, b"o", first=10_000) == again


def _outlives(pool: BlockPool, key: bytes, first: int) -> int:
    """How many releases more than one, each of content that is new, it takes until `key` is lost to the next."""
    for released in count():
        pool.release(_publish(pool, chr(first + released)))
        if pool.find(key) is None:
            return released - 1
    raise AssertionError("it is never lost")


def test_so_many_names_of_lost_content_are_kept() -> None:
    pool, most = BlockPool(1), 16_384
    for number in range(most + 3):
        pool.release(_publish(pool, chr(100 + number)))
    assert len(pool._past) == most
    assert chr(101).encode() not in pool._past
    assert chr(102).encode() in pool._past


def test_what_is_worth_less_goes_first_whatever_its_number() -> None:
    pool = BlockPool(2)
    plain, often = _publish(pool, "p"), _publish(pool, "o")
    for blocks in (plain, often):
        pool.release(blocks)
    pool.share(often)
    pool.release(often)
    assert (plain, pool.alloc(1)) == ([0], [0])


def test_credit_counts_against_credit() -> None:
    pool = BlockPool(3)
    twice, once = _publish(pool, "t"), _publish(pool, "o")
    pool.release(once)
    pool.share(once)
    for _ in range(2):
        pool.release(twice)
        pool.share(twice)
    pool.release(twice)
    for number in range(600):
        pool.release(_publish(pool, chr(1000 + number)))
    pool.release(once)
    assert pool.alloc(3) == [2, *twice, *once], "600 releases later is more than one credit less"


def test_content_that_two_have_computed_is_remembered_once_and_is_worth_more() -> None:
    pool = BlockPool(2)
    taken = pool.alloc(2)
    assert taken is not None
    first, second = taken
    assert pool.publish(first, b"a")
    assert not pool.publish(second, b"a")
    assert not pool.publish(first, b"b"), "a block has one name"
    pool.release([first])
    pool.release([second])
    pool.release(_publish(pool, "n"))
    assert pool.alloc(1) == [second], "what came later but was asked for once"
    assert pool.match([b"a"]) == [first]
    assert pool.find(b"b") is None


def test_a_match_ends_where_the_chain_is_broken() -> None:
    pool = BlockPool(4)
    blocks = _publish(pool, "abcd")
    pool.forget(blocks[2:3])
    assert pool.match([b"a", b"b", b"c", b"d"]) == blocks[:2]
    pool.release(blocks)
    assert pool.match([b"a", b"b", b"c", b"d"]) == blocks[:2]


def test_to_forget_what_has_no_content_changes_nothing() -> None:
    pool = BlockPool(2)
    held = pool.alloc(1)
    assert held is not None
    pool.forget([0, 1])
    check_pool(pool, [held])
    assert pool.available == 1


def test_idle_blocks_are_those_that_nobody_holds() -> None:
    pool = BlockPool(5)
    blocks = _publish(pool, "abcd")
    assert pool.idle(blocks) == 0
    pool.release(blocks)
    pool.share(blocks[:1])
    assert pool.idle(blocks) == 3
    before = pool.available
    pool.share(blocks)
    assert before - pool.available == 3


def test_pools_may_share_their_time() -> None:
    """What is released later is worth more, in whichever of them."""
    age = Age()
    one, other = BlockPool(2, age=age), BlockPool(2, age=age)
    for number in range(6):
        one.release(_publish(one, chr(1000 + number)))
    other.release(_publish(other, "o"))
    assert (age.now, [*other._lines[0].values()]) == (7, [7])
    other.release(other.alloc(1) or [])
    other.release([])
    assert age.now == 7, "only releases of remembered content count"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block, not 0"):
        BlockPool(0)
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="block 0 is published but nobody holds it"):
        pool.publish(0, b"a")
    assert pool.alloc(1) == [0]
    assert pool.alloc(1) is None
    assert pool.alloc(0) == []


def test_content_that_was_lost_and_comes_again_has_its_credit() -> None:
    pool = BlockPool(4)
    for number in range(8):
        pool.release(_publish(pool, chr(1000 + number)))
    first = chr(1000)
    assert pool.match([first.encode()]) == []
    again = _publish(pool, first)
    pool.release(again)
    for number in range(8):
        pool.release(_publish(pool, chr(2000 + number)))
    assert pool.match([first.encode()]) == again


def test_an_owner_above_his_quota_loses_his_own_content_first() -> None:
    pool = BlockPool(8, quota=0.5)
    modest = pool.alloc(3)
    assert modest is not None
    for block, name in zip(modest, "xyz", strict=True):
        pool.publish(block, name.encode(), "modest")
    pool.release(modest)
    for number in range(40):
        blocks = pool.alloc(1)
        assert blocks is not None
        pool.publish(blocks[0], b"%d" % number, "greedy")
        pool.release(blocks)
    assert pool.match([b"x", b"y", b"z"]) == modest
    assert pool.remembered == 8, "room that nobody else wants may be used"


def test_what_an_owner_above_his_quota_still_uses_is_not_asked_of_him() -> None:
    pool = BlockPool(4, quota=0.5)
    modest = _publish(pool, "x", "modest")
    greedy = _publish(pool, "abc", "greedy")
    for blocks in (modest, greedy):
        pool.release(blocks)
    pool.share(greedy)
    assert pool.alloc(1) == modest


@pytest.mark.parametrize("kept", ["", "abc"])
def test_what_nobody_owns_has_no_quota(kept: str) -> None:
    """Whether it was published so or was there from the start."""
    pool = BlockPool(4, quota=0.5, kept=[(block, name.encode()) for block, name in enumerate(kept)])
    if not kept:
        pool.release(_publish(pool, "abc"))
    common = pool.match([b"a", b"b", b"c"])
    pool.share(common)
    pool.release(common)
    one = _publish(pool, "n", "owner")
    pool.release(one)
    assert pool.alloc(1) == one, "what was asked for again is worth more"


def test_kept_content_is_there_from_the_start() -> None:
    pool = BlockPool(4, kept=[(2, b"c"), (0, b"a")])
    assert pool.match([b"a", b"c"]) == [0, 2]
    assert set(pool.alloc(2) or ()) == {1, 3}
    assert pool.alloc(1) == [2], "the least recently used of what was kept goes first"
    check_pool(pool, [[1, 3, 2]])


def test_kept_content_has_no_credit_and_no_owner() -> None:
    lost: list[tuple[int, bytes, str]] = []
    pool = BlockPool(2, kept=[(0, b"k")], evicting=lambda *one: lost.append(one))
    pool.release(_publish(pool, "n"))
    pool.alloc(1)
    assert lost == [(0, b"k", "")]


def test_nothing_is_remembered_when_the_cache_is_off() -> None:
    pool = BlockPool(2, remember=False)
    _publish(pool, "a")
    assert pool.match([b"a"]) == []
    assert pool.remembered == 0


def test_keys_differ_by_salt_secret_and_history() -> None:
    def keys(tokens: list[int], salt: str = "", secret: bytes = b"s") -> list[bytes]:
        found: list[bytes] = []
        KeyChain(2, secret).extend(found, tokens, salt, len(tokens))
        return found

    assert len(keys([1, 2, 3])) == 1
    assert keys([1, 2, 3, 4])[0] == keys([1, 2, 9, 9])[0]
    distinct = [keys([1, 2, 3, 4]), keys([2, 1, 3, 4]), keys([1, 2, 3, 4], "t"), keys([1, 2, 3, 4], "", b"x")]
    assert len({tuple(k) for k in distinct}) == 4
    assert len({k[1] for k in distinct}) == 4


def test_keys_grow_the_same_way_in_pieces() -> None:
    chain, tokens = KeyChain(4, b"s"), list(range(50))
    whole: list[bytes] = []
    chain.extend(whole, tokens, "", 50)
    pieces: list[bytes] = []
    for upto in (3, 4, 11, 12, 13, 40, 50):
        chain.extend(pieces, tokens, "", upto)
    assert pieces == whole
    assert len(whole) == 12
    assert {len(key) for key in whole} == {16}
    copied: list[bytes] = []
    deepcopy(chain).extend(copied, tokens, "", 50)
    assert copied == whole
