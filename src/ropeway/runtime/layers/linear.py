"""Linear layers behind one seam: the weight is packed once for the fastest correct product of this machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class PackedLinear:
    """y = x W^T + b, with W kept in one packed copy.

    `weight` is (out_features, in_features). After construction the caller should drop its own reference to `weight`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, device: torch.device | None = None) -> None:
        device = weight.device if device is None else device
        self.out_features, self.in_features = weight.shape
        self._weight = weight.to(device).contiguous()
        self._bias = None if bias is None else bias.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (T, in_features) contiguous, of the weight's dtype. Returns (T, out_features), contiguous."""
        return functional.linear(x, self._weight, self._bias)


def describe_linear(device: torch.device, dtype: torch.dtype) -> str:
    """One sentence for the start-up banner: how linear layers of `dtype` are computed on `device`."""
    return f"linear layers: torch, {dtype}"
