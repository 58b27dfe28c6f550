"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from torch import Tensor

from ropeway.runtime.kernels.ops import Ops


class RMSNorm:
    """`weight` (D,) on the device of the model; applies to the last dimension."""

    def __init__(self, weight: Tensor, eps: float, ops: Ops) -> None:
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual += x` in place, then the norm of it. Both (T, D)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
