"""Qwen3 (Yang et al. 2025), dense and with experts: no biases by default, and a norm on each head's query and key
(`ModelSpec.qk_norm`)."""

from __future__ import annotations

from ropeway.runtime.models.llama import Llama
from ropeway.runtime.models.mixture import Mixture


class Qwen3(Llama):
    """Differs from Llama by the norms of query and key, and by a head_dim that is free of the hidden size."""


class Qwen3Moe(Mixture):
    """Qwen3 with experts."""
