"""The gated feed-forward part of a decoder layer (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.layers.linear import PackedLinear


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up fused into one product."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear, ops: Ops) -> None:
        self.gate_up, self.down, self.ops = gate_up, down, ops

    def __call__(self, x: Tensor) -> Tensor:
        """(T, hidden) to (T, hidden)."""
        return self.down(self.ops.silu_mul(self.gate_up(x)))
