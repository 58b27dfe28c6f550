"""Who gets what: a key's place among weighted names, the same in every process and after every restart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b


def pick(key: str, weights: Mapping[str, float], salt: str = "") -> str:
    """The name that `key` belongs to, each name with the probability weight / sum of weights.

    Weighted rendezvous hashing: when one weight grows, keys move to that name alone, and between two names no more of
    them than the share that moved. Another `salt` splits the same keys independently. Raises ValueError if no weight is
    positive.
    Source: Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005.
    """
    chosen, soonest = None, math.inf
    for name, weight in weights.items():
        if weight > 0:
            rings = distance(name, key, weight, salt)
            if rings < soonest or chosen is None:
                chosen, soonest = name, rings
    if chosen is None:
        raise ValueError("no weight is positive")
    return chosen


def distance(name: str, key: str, weight: float, salt: str = "") -> float:
    """How far `key` is from `name`: when an exponential clock of that pair rings, which is faster the larger the
    weight. The nearest name has the key."""
    return -math.log(_uniform(salt, name, key)) / weight


def _uniform(salt: str, name: str, key: str) -> float:
    """A number above 0 and at most 1 that is a function of all three."""
    # The lengths keep ("a", "bc") and ("ab", "c") apart.
    data = f"{len(salt)},{len(name)}:{salt}{name}{key}".encode("utf-8", "surrogatepass")
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "big") + 0.5) / 2**64
