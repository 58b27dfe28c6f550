"""Uniform numbers that depend on (seed, index) alone, so that batching changes no draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: list[int], indices: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1), a multiple of 2^-52, for each pair of seed and index. Any integers will do."""
    seed = np.array([s & _MASK for s in seeds], dtype=np.uint64)
    index = np.array([i & _MASK for i in indices], dtype=np.uint64)
    # Both are mixed before they meet: neighbouring seeds and indices must not produce shifted copies of one stream.
    bits = _mix(_mix(seed + _GOLDEN) ^ _mix((index + np.uint64(1)) * _GOLDEN))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def derive(seed: int, rid: int) -> int:
    """A seed for a request that brings none: from the engine's seed and the request's id."""
    pair = np.array([seed & _MASK, rid & _MASK], dtype=np.uint64)
    return int(_mix(_mix(pair[:1] + _GOLDEN) + pair[1:] * _MIX_2)[0])
