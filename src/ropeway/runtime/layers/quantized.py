"""Weights in integers, as checkpoints store them and quantizers make them, before they are packed for a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) = (out_features, in_features) as (value - zero) * scale.

    'int8': `values` (N, K) int8 within [-127, 127], `scales` (N,), no zeros, `group` 0.
    'int4': `values` (N, K) uint8 within 0..15, `scales` and `zeros` (N, K / group), a scale for every `group`
    neighbouring input features. Scales are float32, zeros uint8 within 0..15; None is 8 throughout.
    """

    format: Literal["int8", "int4"]
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int = 0

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        if self.format == "int8":
            return self.values.float() * self.scales[:, None]
        steps = self.values.float().view(*self.scales.shape, self.group)
        steps -= 8.0 if self.zeros is None else self.zeros.float()[..., None]
        return (steps * self.scales[..., None]).view(self.values.shape)
