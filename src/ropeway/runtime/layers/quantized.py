"""Quantized weights, as checkpoints store them and quantizers make them, before they are packed for a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ropeway.errors import ModelError

_WIDENED = 1 << 22
"""Elements that are in float32 at a time while a weight is widened."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) = (out_features, in_features) as (value - zero) * scale.

    'int8': `values` (N, K) int8 within [-127, 127], `scales` (N,), no zeros, `group` 0.
    'int4': `values` (N, K) uint8 within 0..15, `scales` and `zeros` (N, K / group), a scale for every `group`
    neighbouring input features. Scales are float32, zeros uint8 within 0..15; None is 8 throughout.
    'fp8': `values` (N, K) float8_e4m3fn, no zeros, `scales` (N,), or (N, ceil(K / group)) with a scale for every
    `group` neighbouring input features, of which the last may be fewer.
    `order` (K,) int64 says which input feature each column belongs to (GPTQ's act-order); None is their own order.
    """

    format: Literal["int8", "int4", "fp8"]
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int = 0
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight in float32, its columns in the order of `values`."""
        if not self.group:
            return self.values.float() * self.scales[:, None]
        if self.format == "fp8":
            depth = self.values.shape[1]
            return self.values.float() * self.scales.repeat_interleave(self.group, dim=1)[:, :depth]
        steps = self.values.float().view(*self.scales.shape, self.group)
        steps -= 8.0 if self.zeros is None else self.zeros.float()[..., None]
        return (steps * self.scales[..., None]).view(self.values.shape)

    def part(self, rows: Tensor | slice) -> QuantizedWeight:
        """Some of its rows."""
        values = as_bytes(self.values)[rows].view(self.values.dtype)
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, values=values, scales=self.scales[rows], zeros=zeros)

    def widen(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, never in float32 as a whole, its columns in the order of `values`."""
        count, depth = self.values.shape
        out = torch.empty((count, depth), dtype=dtype, device=self.values.device)
        step = max(1, _WIDENED // max(depth, 1))
        for first in range(0, count, step):
            rows = slice(first, first + step)
            out[rows] = self.part(rows).dequantize()
        return out

    def to(self, device: torch.device) -> QuantizedWeight:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), zeros=zeros)


def as_bytes(values: Tensor) -> Tensor:
    """The same memory as a type that torch can index and join, which it cannot do with all floats of 8 bits."""
    return values.view(torch.uint8)


def checked(weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` ready to be packed: an int4 weight's scales rounded to float16, which is what all products keep.

    Raises ModelError if its shapes do not fit each other, or a scale is no finite float16.
    """
    rows, depth = weight.values.shape
    scales = weight.scales
    if not weight.group and weight.format != "int4":
        shape: tuple[int, ...] = (rows,)
    elif weight.format == "fp8":
        shape = (rows, -(-depth // weight.group))
    else:
        if weight.group <= 0 or depth % weight.group:
            raise ModelError(
                f"An int4 weight of {rows} x {depth} cannot be cut into groups of {weight.group} input features. "
                f"Quantize it with a group size that divides {depth}."
            )
        shape = (rows, depth // weight.group)
        scales = weight.scales.half().float()
    for name, tensor in (("scales", scales), ("zero points", weight.zeros)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ModelError(
                f"An {weight.format} weight of {rows} x {depth} has {name} of shape {tuple(tensor.shape)}, "
                f"not {shape}. The checkpoint is damaged, or its quantization_config does not describe it."
            )
    if not scales.isfinite().all():
        raise ModelError(
            f"An {weight.format} weight has a scale that is not finite"
            f"{' in float16' if weight.format == 'int4' else ''}. Quantize the model again."
        )
    return replace(weight, scales=scales)
