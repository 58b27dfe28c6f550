"""DeepSeek-V2 and V3 (DeepSeek-AI 2024) and their kin: experts, and attention to one latent for all heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropeway.modelspec import ModelSpec
from ropeway.modelspec.latent import further_layers
from ropeway.runtime.layers.latent import LatentAttention
from ropeway.runtime.layers.norm import RMSNorm
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.models.mixture import Mixture
from ropeway.runtime.weights import formats
from ropeway.runtime.weights.loader import Weights

_EPS = 1e-6
"""Of the norms of latents, whatever the config says of the others."""


class Deepseek(Mixture):
    """Differs from others with experts by its attention. Layers that predict further tokens are left out."""

    def __init__(self, spec: ModelSpec, weights: Weights, *rest: Any) -> None:
        weights.ignore(further_layers(weights.shapes(), spec.layers))
        super().__init__(spec, weights, *rest)

    def build_attention(self, prefix: str, number: int) -> LatentAttention:
        spec, latent = self.spec, self.spec.latent
        assert latent is not None, "specs of these architectures have one"
        queries = spec.heads * (latent.nope + latent.rope)
        name, width = ("q_a_proj", latent.q_rank) if latent.q_rank else ("q_proj", queries)
        names, outs = [name, "kv_a_proj_with_mqa"], [width, latent.width]
        up = q_norm = None
        if latent.q_rank:
            up = self.build_linear(prefix, ["q_b_proj"], [queries], latent.q_rank, bias=False)
            q_norm = self.build_latent_norm(prefix + "q_a_layernorm.weight", latent.q_rank)
        return LatentAttention(
            spec,
            number,
            self.build_linear(prefix, names, outs, spec.hidden, bias=spec.qkv_bias),
            self.plain(prefix + "kv_b_proj", spec.heads * (latent.nope + latent.value), latent.rank),
            self.build_latent_norm(prefix + "kv_a_layernorm.weight", latent.rank),
            self.build_linear(prefix, ["o_proj"], [spec.hidden], spec.heads * latent.value, bias=spec.out_bias),
            self.backend,
            up,
            q_norm,
        )

    def build_latent_norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.weights.take(name, (size,)).to(self.device), _EPS, self.ops)

    def plain(self, module: str, outs: int, ins: int) -> Tensor:
        """The weight of a linear layer in the model's dtype, however it is stored and the others are quantized."""
        if self.weights.stored is None or not formats.is_quantized(self.weights, module):
            return self.weights.take(module + ".weight", (outs, ins)).to(self.device)
        weight = self.weights.linear([module], [outs], ins)
        if isinstance(weight, QuantizedWeight):
            wide = weight.widen(self.weights.dtype)
            weight = wide if weight.order is None else torch.empty_like(wide).index_copy_(1, weight.order, wide)
        return weight.to(self.device, self.weights.dtype)
