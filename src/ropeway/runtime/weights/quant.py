"""Quantize weights without data: int8 and fp8 for each output channel, int4 in groups by a search for the least squared
error.

Rows are taken in chunks whose temporaries stay in the cache, so that a weight is never held in float32 as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropeway.runtime.layers.integer import FP8_MOST
from ropeway.runtime.layers.quantized import QuantizedWeight

_CHUNK = 1 << 18
_SHRINK = (1.0, 0.9, 0.8)
"""Shares of a group's range that are tried: clipping its largest values can cost less than coarser steps for all. Seven
of them would take twice the time for 1.2 % less error."""
_SMALLEST = 1e-10


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """`weight` (N, K) in int8 within [-127, 127], one scale for each row: its largest magnitude is 127."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    for rows in _chunks(weight):
        chunk = weight[rows].float()
        scale = storable(chunk.abs().amax(1).clamp_(min=_SMALLEST) / 127)
        scales[rows] = scale
        values[rows] = (chunk / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(format="int8", values=values, scales=scales, zeros=None, group=0)


def quantize_fp8(weight: Tensor) -> QuantizedWeight:
    """`weight` (N, K) in e4m3, one scale for each row: its largest magnitude is 448."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    for rows in _chunks(weight):
        chunk = weight[rows].float()
        scale = storable(chunk.abs().amax(1).clamp_(min=_SMALLEST) / FP8_MOST)
        scales[rows] = scale
        values[rows] = (chunk / scale[:, None]).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
    return QuantizedWeight(format="fp8", values=values, scales=scales)


def quantize_int4(weight: Tensor, group: int) -> QuantizedWeight:
    """`weight` (N, K) in 0..15 with a scale and a zero point for every `group` input features; K is a multiple of it.

    For each group the range that leaves the least squared error is searched, and the scale is then the least-squares
    one for the values found.
    """
    rows, depth = weight.shape
    values = torch.empty((rows, depth), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, depth // group), device=weight.device)
    zeros = torch.empty((rows, depth // group), dtype=torch.uint8, device=weight.device)
    for part in _chunks(weight):
        grouped = weight[part].float().view(-1, group)
        scale, zero = search_int4(grouped)
        quants = (grouped / scale).add_(zero).round_().clamp_(0, 15)
        scale = storable(_refit(grouped, quants - zero, scale))
        values[part] = quants.to(torch.uint8).view(-1, depth)
        scales[part] = scale.view(-1, depth // group)
        zeros[part] = zero.to(torch.uint8).view(-1, depth // group)
    return QuantizedWeight(format="int4", values=values, scales=scales, zeros=zeros, group=group)


def rounding(format: str, group: int) -> Callable[[str, Tensor], QuantizedWeight]:
    """The functions above as `export.Quantize`."""
    by_channel = {"int8": quantize_int8, "fp8": quantize_fp8}.get(format)
    return lambda _, weight: by_channel(weight) if by_channel else quantize_int4(weight, group)


def search_int4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, each (M, 1) float32, for each row of `grouped` (M, group) float32."""
    low = grouped.amin(1, keepdim=True).clamp_(max=0)
    high = grouped.amax(1, keepdim=True).clamp_(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    exact, rounded = torch.empty_like(grouped), torch.empty_like(grouped)
    for share in _SHRINK:
        scale = ((high - low) * (share / 15)).clamp_(min=_SMALLEST)
        zero = (low * -share).div_(scale).round_().clamp_(0, 15)
        torch.addcdiv(zero, grouped, scale, out=exact)
        torch.round(exact, out=rounded).clamp_(0, 15)
        rounded.sub_(exact)
        error = torch.linalg.vector_norm(rounded, dim=1, keepdim=True).mul_(scale)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _refit(grouped: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """The scale s that minimises |grouped - s * steps|^2 for each row."""
    square = (steps * steps).sum(1, keepdim=True)
    fitted = (grouped * steps).sum(1, keepdim=True) / square
    return torch.where((square > 0) & (fitted > 0), fitted, scale)


def storable(scale: Tensor) -> Tensor:
    """`scale` as bfloat16 holds it, which is how checkpoints keep scales: what is written is what was computed with."""
    return scale.to(torch.bfloat16).float()


def _chunks(weight: Tensor) -> list[slice]:
    """Slices of rows of about `_CHUNK` elements."""
    step = max(1, _CHUNK // max(weight.shape[1], 1))
    return [slice(first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step)]
