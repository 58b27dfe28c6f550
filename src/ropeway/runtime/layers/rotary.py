"""Rotary position embedding (RoFormer, Su et al. 2021) and the ways of stretching it over longer contexts.

A key is rotated once, when it enters the cache, and may later be shared by any sequence with the same prefix. So the
angle at a position must be a function of the position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ropeway.modelspec import RopeSpec


def rotary_tables(
    rope: RopeSpec, head_dim: int, max_position: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim / 2) float32; row p belongs to position p.

    `max_position` is the model's `max_position_embeddings`.
    """
    positions = torch.arange(length, dtype=torch.int64).float()
    scale = _attention_factor(rope)
    if rope.kind == "dynamic":
        frequencies = _dynamic(rope, head_dim, max_position, length)
        angles = positions[:, None] * frequencies
    else:
        angles = positions[:, None] * _FREQUENCIES[rope.kind](rope, head_dim)
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def _default(rope: RopeSpec, head_dim: int) -> Tensor:
    return _inverse(rope.theta, head_dim)


def _inverse(theta: float | Tensor, head_dim: int) -> Tensor:
    """theta^(-2i / head_dim) for i < head_dim / 2."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def _linear(rope: RopeSpec, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al. 2023): all positions shrink by `factor`."""
    return _inverse(rope.theta, head_dim) / rope.factor


def _dynamic(rope: RopeSpec, head_dim: int, max_position: int, length: int) -> Tensor:
    """Dynamic NTK scaling: beyond the trained length the base grows with the length. Returns (length, head_dim / 2).

    Up to `max_position` positions nothing is scaled. Hugging Face takes the base from the longest length that it has
    seen in a batch, so that a cached key would depend on its neighbours. Here position p takes the base of length
    p + 1: the same numbers as Hugging Face's for every token that is generated beyond the trained length after a
    prompt within it, and independent of chunks, batches and shared prefixes for longer prompts too.
    """
    lengths = torch.arange(1, length + 1, dtype=torch.float64).clamp(min=max_position)
    growth = (rope.factor * lengths / max_position) - (rope.factor - 1)
    theta = rope.theta * growth ** (head_dim / (head_dim - 2))
    return _inverse(theta.float()[:, None], head_dim)


def _yarn(rope: RopeSpec, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): slow dimensions are interpolated, fast ones kept, those between blended by a ramp."""

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(rope.original_max / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    kept, interpolated = 1.0 / powers, 1.0 / (rope.factor * powers)
    return interpolated * ramp + kept * (1 - ramp)


def _llama3(rope: RopeSpec, head_dim: int) -> Tensor:
    """Llama 3.1: wavelengths above a limit are stretched by `factor`, short ones kept, those between blended."""
    inverse = _inverse(rope.theta, head_dim)
    longest = rope.original_max / rope.low_freq_factor
    shortest = rope.original_max / rope.high_freq_factor
    wavelength = 2 * math.pi / inverse
    blend = (rope.original_max / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    stretched = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, stretched)


_FREQUENCIES: dict[str, Callable[[RopeSpec, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}


def _attention_factor(rope: RopeSpec) -> float:
    """What YaRN multiplies cos and sin by, to keep the attention's temperature over a longer context."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
