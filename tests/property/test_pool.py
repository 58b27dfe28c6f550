"""The pool of blocks against a model of sets and dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ropeway.kv import BlockPool, KeyChain

SIZE = 4


class PoolMachine(RuleBasedStateMachine):
    """Tables of blocks as sequences would hold them; contents are written when a block is allocated."""

    @initialize(blocks=st.integers(1, 24))
    def start(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.chain = KeyChain(SIZE, b"secret")
        self.tables: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40))
    def board(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        self.chain.extend(keys, tokens, "", len(tokens))
        matched = self.pool.match(keys)
        for index, block in enumerate(matched):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        needed = -(-len(tokens) // SIZE) - len(matched)
        if self.pool.available - self.pool.idle(matched) < needed:
            return
        self.pool.share(matched)
        fresh = self.pool.alloc(needed)
        assert fresh is not None
        assert len(set(fresh) | set(matched)) == len(fresh) + len(matched)
        table = matched + fresh
        for index, block in enumerate(table[len(matched) :], len(matched)):
            self.content[block] = tuple(tokens[: (index + 1) * SIZE])
        for index, key in enumerate(keys):
            self.pool.publish(table[index], key)
        self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 1000))
    def leave(self, pick: int) -> None:
        _, table = self.tables.pop(pick % len(self.tables))
        self.pool.release(table)

    @rule()
    def too_many(self) -> None:
        assert self.pool.alloc(self.pool.available + 1) is None

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([table for _, table in self.tables])


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
