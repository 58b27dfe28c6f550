"""Weights in integers, as checkpoints store them and quantizers make them, before they are packed for a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ropeway.errors import ModelError


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) = (out_features, in_features) as (value - zero) * scale.

    'int8': `values` (N, K) int8 within [-127, 127], `scales` (N,), no zeros, `group` 0.
    'int4': `values` (N, K) uint8 within 0..15, `scales` and `zeros` (N, K / group), a scale for every `group`
    neighbouring input features. Scales are float32, zeros uint8 within 0..15; None is 8 throughout.
    `order` (K,) int64 says which input feature each column belongs to (GPTQ's act-order); None is their own order.
    """

    format: Literal["int8", "int4"]
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int = 0
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight in float32, its columns in the order of `values`."""
        if self.format == "int8":
            return self.values.float() * self.scales[:, None]
        steps = self.values.float().view(*self.scales.shape, self.group)
        steps -= 8.0 if self.zeros is None else self.zeros.float()[..., None]
        return (steps * self.scales[..., None]).view(self.values.shape)

    def to(self, device: torch.device) -> QuantizedWeight:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), zeros=zeros)


def checked(weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` ready to be packed: an int4 weight's scales rounded to float16, which is what all products keep.

    Raises ModelError if its shapes do not fit each other, or a scale is no finite float16.
    """
    rows, depth = weight.values.shape
    if weight.format == "int8":
        shape: tuple[int, ...] = (rows,)
        scales = weight.scales
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
            f"{'' if weight.format == 'int8' else ' in float16'}. Quantize the model again."
        )
    return replace(weight, scales=scales)
