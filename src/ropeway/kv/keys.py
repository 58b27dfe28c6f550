"""Names of full KV blocks: a keyed 128-bit hash chain over tokens.

A block's key covers all tokens from the start of the sequence to the block's end, so equal keys mean equal content.
The chain starts from a salt, so sequences with different salts never share; the secret makes keys unpredictable
(BLAKE2b, RFC 7693, keyed mode), so that nobody can craft a collision or probe for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

KEY_BYTES = 16


class KeyChain:
    """Makes keys for blocks of `block_size` tokens under one `secret` (at most 64 bytes)."""

    def __init__(self, block_size: int, secret: bytes) -> None:
        self._block_size, self._secret = block_size, secret
        self._keyed = blake2b(digest_size=KEY_BYTES, key=secret)  # copied for each block: the key is hashed in once
        self._content = Struct(f"={block_size}q")

    def __reduce__(self) -> tuple[type[KeyChain], tuple[int, bytes]]:
        return KeyChain, (self._block_size, self._secret)  # a hash object can neither be copied by parts nor stored

    def root(self, salt: str) -> bytes:
        """The parent of a sequence's first block."""
        return blake2b(salt.encode(), digest_size=KEY_BYTES, key=self._secret, person=b"ropeway-root").digest()

    def extend(self, keys: list[bytes], tokens: Sequence[int], salt: str, upto: int) -> None:
        """Append to `keys` the keys of all full blocks that end at or before token `upto`."""
        size = self._block_size
        parent = keys[-1] if keys else self.root(salt)
        for start in range(len(keys) * size, upto - size + 1, size):
            block = self._keyed.copy()
            block.update(parent + self._content.pack(*tokens[start : start + size]))
            parent = block.digest()
            keys.append(parent)
