"""Self-attention of one decoder layer: one fused q/k/v product, rotary embedding, paged attention, output product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ropeway.modelspec import ModelSpec
from ropeway.runtime.attention.backend import AttentionBackend
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.norm import RMSNorm


class Attention:
    """`qkv` gives q, k and v side by side. `q_norm` and `k_norm` (Qwen3) act on each head before the rotation."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        qkv: PackedLinear,
        out: PackedLinear,
        backend: AttentionBackend,
        ops: Ops,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.qkv, self.out = qkv, out
        self.backend, self.ops = backend, ops
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, kv: Tensor, meta: Any) -> Tensor:
        """`x` (T, hidden); `rotary` the cos and sin tables; `kv` the whole KV store. Returns (T, hidden)."""
        heads = self.qkv(x).view(x.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        q = heads[:, : self.heads]
        k = heads[:, self.heads : self.heads + self.kv_heads]
        v = heads[:, self.heads + self.kv_heads :]
        rotation = Rotation(self.ops, *rotary, positions, self.q_norm, self.k_norm)
        return self.out(self.backend.forward(self.layer, q, k, v, kv, meta, rotation))
