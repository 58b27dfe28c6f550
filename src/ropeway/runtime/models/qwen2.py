"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's decoder with biases on q, k and v (`ModelSpec.qkv_bias`), and in some
checkpoints sliding windows in the upper layers."""

from __future__ import annotations

from ropeway.runtime.models.llama import Llama


class Qwen2(Llama):
    """Differs from Llama by biases and windows, both in the spec."""
