"""Prefixes that stay cached whatever else is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ropeway.contract import Pinned
from ropeway.errors import RequestError
from ropeway.kv.pool import BlockPool

MOST = 4  # one block in so many may be pinned


class Pins:
    """Holds the blocks of named prefixes of `pool`, from the moment that somebody has computed them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._keys: dict[str, list[bytes]] = {}
        self.held: dict[bytes, int | None] = {}  # all keys of all pins, and the block once there is one

    @property
    def reserved(self) -> int:
        """Blocks of the pool that pins hold or will hold."""
        return len(self.held)

    def add(self, name: str, keys: Sequence[bytes], room: int) -> None:
        """Pin the content of `keys` as `name`, replacing what was pinned so. `room` is how many blocks the requests of
        this moment leave for all pins. Raises RequestError, with the numbers, if it would be too much."""
        others = {key for other, pinned in self._keys.items() if other != name for key in pinned}
        total, most = len(others.union(keys)), self._pool.num_blocks // MOST
        if not keys:
            raise RequestError("The prefix is shorter than one KV block; only whole blocks are cached.", param="prompt")
        if total > min(most, room):
            bound = f"at most {most} of {self._pool.num_blocks}" if most <= room else f"open requests leave {room}"
            raise RequestError(
                f"With this prefix of {len(keys)} KV blocks, {total} would be pinned, but {bound}. "
                f"Unpin another prefix{'' if most <= room else ', or try again later'}.",
                param="prompt",
            )
        self.remove(name)
        self._keys[name] = list(keys)
        for key in keys:
            if self.held.setdefault(key, None) is None:
                block = self._pool.find(key)
                if block is not None:
                    self.adopt(block, key)

    def remove(self, name: str) -> bool:
        """Give up the prefix `name`. False if there is none."""
        gone = self._keys.pop(name, None)
        others = {key for pinned in self._keys.values() for key in pinned}
        blocks = [self.held.pop(key) for key in gone or () if key not in others]
        self._pool.release([block for block in blocks if block is not None])
        return gone is not None

    def adopt(self, block: int, key: bytes) -> None:
        """`block` has the content `key` now: hold it if it is pinned."""
        if key in self.held:
            self.held[key] = block
            self._pool.share([block])

    def drop(self, keys: Iterable[bytes]) -> None:
        """This content is void. Whoever computes it again is welcome."""
        for key in keys:
            block = self.held.get(key)
            if block is not None:
                self.held[key] = None
                self._pool.release([block])

    def listing(self, block_size: int) -> list[Pinned]:
        return [
            Pinned(name, len(keys) * block_size, len(keys), sum(self.held[key] is not None for key in keys))
            for name, keys in self._keys.items()
        ]
