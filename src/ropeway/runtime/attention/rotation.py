"""What queries and keys still need between the q/k/v product and attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.layers.norm import RMSNorm


@dataclass(frozen=True)
class Rotation:
    """Norms of each head (Qwen3), if there are any, then rotary embedding.

    Calling it does one after the other with `ops`. A back end may read the fields instead, and do the same in the
    kernel that writes K: then nothing of it passes through memory. `cos` and `sin` are float32 tables
    (max_positions, n / 2), contiguous, as `Ops.rotary` takes them; `positions` (T,) int64 picks their rows. Both norms
    are there, or neither.
    """

    ops: Ops
    cos: Tensor
    sin: Tensor
    positions: Tensor
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q` (T, heads, head_dim) and `k` (T, kv_heads, head_dim), rotated, in place unless there are norms."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        self.ops.rotary(q, k, self.cos, self.sin, self.positions)
        return q, k
