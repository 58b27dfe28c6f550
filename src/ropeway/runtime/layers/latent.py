"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024), in the form that never expands what is cached.

A head's key is `W_k c` and its value `W_v c` of the token's latent c. Since q . (W_k c) = (W_k^T q) . c, the query goes
through W_k once instead of every cached latent, all heads attend to the latents themselves, and W_v is applied to the
weighted sum. So decoding reads rank + rope elements for each token and layer, however many heads there are. Prompts are
computed in the same form: it takes more arithmetic for each pair of tokens (about 3.4 times in DeepSeek-V3's shape) but
none for expanding the cache anew in each chunk, and it is one path for all rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ropeway.modelspec import ModelSpec
from ropeway.modelspec.latent import LatentSpec
from ropeway.runtime.attention.backend import AttentionBackend
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.norm import RMSNorm

Tables = tuple[Tensor, Tensor]
Fill = Callable[[LatentSpec, Tensor, Tensor, RMSNorm, Tables, Tensor], tuple[Tensor, Tensor]]
"""From queries (T, heads, nope + rope) and tokens (T, rank + rope), as the products leave them, the norm of latents,
the tables of cos and sin, and positions (T,), to q (T, heads, rank + rope) with its last `rope` elements set, and k
(T, 1, rank + rope)."""


class LatentAttention:
    """`down` gives the query, or its latent, and the token's latent with its rotary part, side by side. `up` with
    `q_norm` makes queries of a latent; both are None if queries come straight from `down`."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        down: PackedLinear,
        expansion: Tensor,
        kv_norm: RMSNorm,
        out: PackedLinear,
        backend: AttentionBackend,
        up: PackedLinear | None = None,
        q_norm: RMSNorm | None = None,
    ) -> None:
        """`expansion` is (heads * (nope + value), rank), each head's W_k above its W_v."""
        assert spec.latent is not None, "only specs with a latent get here"
        self.layer, self.heads, self.latent = layer, spec.heads, spec.latent
        self.down, self.up, self.out = down, up, out
        self.q_norm, self.kv_norm = q_norm, kv_norm
        self.backend, self.fill = backend, select_fill(expansion.device)
        by_head = expansion.view(spec.heads, -1, spec.latent.rank)
        self.to_latent = by_head[:, : spec.latent.nope].contiguous()  # (heads, nope, rank)
        self.to_value = by_head[:, spec.latent.nope :].transpose(1, 2).contiguous()  # (heads, rank, value)

    def __call__(self, x: Tensor, rotary: Tables, positions: Tensor, kv: Tensor, meta: Any) -> Tensor:
        """As `layers.attention.Attention`: `x` (T, hidden) to (T, hidden)."""
        shape, count = self.latent, x.shape[0]
        down = self.down(x)
        queries, tokens = down[:, : -shape.width], down[:, -shape.width :]
        if self.up is not None and self.q_norm is not None:
            queries = self.up(self.q_norm(queries))
        queries = queries.reshape(count, self.heads, shape.nope + shape.rope)
        q, k = self.fill(shape, queries, tokens, self.kv_norm, rotary, positions)
        absorbed = q[..., : shape.rank].transpose(0, 1)
        torch.bmm(queries[..., : shape.nope].transpose(0, 1), self.to_latent, out=absorbed)

        mixed = self.backend.forward(self.layer, q, k, k[..., : shape.rank], kv, meta)
        values = x.new_empty((count, self.heads, shape.value))
        by_head = mixed.view(count, self.heads, shape.rank).transpose(0, 1)
        torch.bmm(by_head, self.to_value, out=values.transpose(0, 1))
        return self.out(values.flatten(1))


def select_fill(device: torch.device) -> Fill:
    """One Triton kernel on CUDA where there is Triton, else one operation after the other."""
    if device.type != "cuda" or find_spec("triton") is None:
        return fill
    from ropeway.runtime.kernels.triton import latent  # late: only a GPU needs Triton

    return latent.fill


def fill(
    latent: LatentSpec, queries: Tensor, tokens: Tensor, norm: RMSNorm, rotary: Tables, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """`Fill` by the operations that `norm` is computed with."""
    count, heads, _ = queries.shape
    arrange = _halves if latent.interleaved else Tensor.contiguous
    q_turned, k_turned = arrange(queries[..., latent.nope :]), arrange(tokens[:, None, latent.rank :])
    norm.ops.rotary(q_turned, k_turned, *rotary, positions)
    q, k = queries.new_empty((count, heads, latent.width)), queries.new_empty((count, 1, latent.width))
    q[..., latent.rank :] = q_turned
    k[:, 0, : latent.rank] = norm(tokens[:, : latent.rank])
    k[..., latent.rank :] = k_turned
    return q, k


def _halves(x: Tensor) -> Tensor:
    """`x` (T, heads, rope) as the rotation wants it, in new memory: first halves of all pairs, then second ones.
    Queries and keys are reordered alike, so that their products stay the same."""
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
