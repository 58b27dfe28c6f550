"""Qwen3 dense models (Yang et al. 2025): no biases by default, and a norm on each head's query and key."""

from __future__ import annotations

from ropeway.runtime.layers.attention import Attention
from ropeway.runtime.models.llama import Llama


class Qwen3(Llama):
    """Differs from Llama by the norms of query and key, and by a head_dim that is free of the hidden size."""

    def build_attention(self, prefix: str, number: int) -> Attention:
        attention = super().build_attention(prefix, number)
        attention.q_norm = self.build_norm(prefix + "q_norm.weight", self.spec.head_dim)
        attention.k_norm = self.build_norm(prefix + "k_norm.weight", self.spec.head_dim)
        return attention
