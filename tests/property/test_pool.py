"""The pool of blocks against a model of sets and dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from invariants import check_pool
from ropeway.kv import BlockPool, KeyChain
from ropeway.kv.pool import CREDIT

SIZE = 4


class PoolMachine(RuleBasedStateMachine):
    """Tables of blocks as sequences would hold them; contents are written when a block is allocated."""

    @initialize(blocks=st.integers(1, 24), quota=st.sampled_from([1.0, 0.5, 0.2]))
    def start(self, blocks: int, quota: float) -> None:
        self.lost: list[tuple[int, bytes, str]] = []
        self.pool = BlockPool(blocks, quota=quota, evicting=lambda *lost: self.lost.append(lost))
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
        self.lost.clear()
        fresh = self.pool.alloc(needed)
        assert fresh is not None
        assert {block for block, _, _ in self.lost} <= set(fresh), "only what is handed out is lost"
        assert all(self.pool.find(key) is None for _, key, _ in self.lost)
        assert len(set(fresh) | set(matched)) == len(fresh) + len(matched)
        table = matched + fresh
        for index, block in enumerate(table[len(matched) :], len(matched)):
            self.content[block] = tuple(tokens[: (index + 1) * SIZE])
        for index, key in enumerate(keys):
            self.pool.publish(table[index], key, owner)
        self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 1000))
    def leave(self, pick: int) -> None:
        _, table = self.tables.pop(pick % len(self.tables))
        self.pool.release(table)

    @rule(tokens=st.lists(st.integers(0, 2), min_size=SIZE, max_size=40))
    def spoil(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        self.chain.extend(keys, tokens, "", len(tokens))
        self.pool.forget(self.pool.match(keys))
        assert self.pool.match(keys) == []

    @rule(name=st.binary(min_size=16, max_size=16))
    def keep(self, name: bytes) -> None:
        room = self.pool.available
        block = self.pool.keep(name, "z") if self.pool.find(name) is None else self.pool.find(name)
        assert (block is None) == (room == 0)
        if block is not None:
            assert self.pool.find(name) == block
            self.content[block] = ()
        assert self.pool.available == room

    @rule()
    def too_many(self) -> None:
        assert self.pool.alloc(self.pool.available + 1) is None

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            check_pool(self.pool, [table for _, table in self.tables])


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def _publish(pool: BlockPool, names: str) -> list[int]:
    blocks = pool.alloc(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name.encode())
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


def test_credit_runs_out() -> None:
    pool = BlockPool(4)
    often = _publish(pool, "o")
    pool.release(often)
    pool.share(often)
    pool.release(often)
    for number in range(CREDIT + 10):
        pool.release(_publish(pool, chr(1000 + number)))
    assert pool.match([b"o"]) == []


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


def test_kept_content_is_there_from_the_start() -> None:
    pool = BlockPool(4, kept=[(2, b"c"), (0, b"a")])
    assert pool.match([b"a", b"c"]) == [0, 2]
    assert set(pool.alloc(2) or ()) == {1, 3}
    assert pool.alloc(1) == [2], "the least recently used of what was kept goes first"
    check_pool(pool, [[1, 3, 2]])


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
