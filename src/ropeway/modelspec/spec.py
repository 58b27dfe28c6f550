"""A model's shape, limits and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ropeway.modelspec.experts import ExpertSpec
from ropeway.modelspec.latent import LatentSpec
from ropeway.modelspec.quantization import QuantSpec, matrix_bytes, packed_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: its kind and the parameters that the kind uses; lengths in tokens."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @property
    def sharpness(self) -> float:
        """What DeepSeek multiplies queries, and keys, by where a context is stretched by YaRN."""
        if self.kind == "default" or not self.mscale_all_dim or self.factor <= 1:
            return 1.0
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is known of a model before its weights are read.

    `windows[l]` is layer l's sliding window in tokens or None. `context_limit` is the longest sequence that the model
    is made for, rope scaling included. `dtype` is the checkpoint's. `eos_ids` joins config and generation config.
    `generation` are the checkpoint's own sampling defaults, `stored_parameters` the count by the safetensors headers
    (None without weights). `quantization` says how the checkpoint's linear layers are stored, None if plainly.

    `experts` are in the place of some layers' MLP. With `latent` attention one KV head holds the latent: `kv_heads` is
    1 and `head_dim` the latent's width, of which V is a part.
    """

    implementation: ClassVar[str] = "native"
    """Whose code computes it: 'native', or another name of `EngineConfig.model_impl`."""

    name: str
    directory: Path
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float = 1e-6
    rope: RopeSpec = RopeSpec()
    max_position: int
    context_limit: int
    dtype: str
    windows: tuple[int | None, ...]
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: ExpertSpec | None = None
    latent: LatentSpec | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    stored_parameters: int | None = None
    quantization: QuantSpec | None = None

    @property
    def rotary_dim(self) -> int:
        """Elements of a query's head that are rotated."""
        return self.head_dim if self.latent is None else self.latent.rope

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        if self.latent is None:
            return float(self.head_dim**-0.5)
        return float((self.latent.nope + self.latent.rope) ** -0.5) * self.rope.sharpness**2

    @property
    def parameters(self) -> int:
        """Number of parameters by formula; tied embeddings count once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        small = sum(map(self._small, range(self.layers)))
        return sum(outs * ins for outs, ins in self.linears) + small + self.routers + embeddings + self.hidden

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the experts, the chosen ones."""
        experts = self.experts
        if experts is None:
            return self.parameters
        return (
            self.parameters - sum(experts.sparse) * (experts.count - experts.chosen) * 3 * experts.inner * self.hidden
        )

    @property
    def routers(self) -> int:
        """Parameters of the experts' routers, which are held in float32."""
        return 0 if self.experts is None else sum(self.experts.sparse) * self.experts.router(self.hidden)

    @property
    def mlp_width(self) -> int:
        """Elements of a token's intermediate results in the widest MLP: gate, up and their product, and of experts
        also what goes in and comes out."""
        experts, dense = self.experts, 3 * self.intermediate
        if experts is None:
            return dense
        sparse = experts.chosen * (3 * experts.inner + 2 * self.hidden) + 3 * experts.shared
        return sparse if all(experts.sparse) else max(sparse, dense)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every weight matrix of the layers that may be quantized. The embeddings,
        routers and the expansion of latents are not among them."""
        return [pair for layer in range(self.layers) for pair in self._linears(layer)]

    @property
    def modules(self) -> list[str]:
        """Names of the linear layers behind `linears`, where each is stored by itself, in the order in which a token
        meets them."""
        names = [f"self_attn.{x}_proj" for x in "qkvo"] if self.latent is None else self.latent.modules()
        dense = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        experts = [self._experts(layer) for layer in range(self.layers)]
        layers = [dense if found is None else found.modules() for found in experts]
        return [f"model.layers.{layer}.{name}" for layer, mlp in enumerate(layers) for name in (*names, *mlp)]

    def _experts(self, layer: int) -> ExpertSpec | None:
        """The experts, if the layer has them."""
        return self.experts if self.experts is not None and self.experts.sparse[layer] else None

    def _linears(self, layer: int) -> list[tuple[int, int]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.latent is not None:
            attention = self.latent.linears(self.hidden, self.heads)
        else:
            attention = [(q + 2 * kv, self.hidden), (self.hidden, q)]
        experts = self._experts(layer)
        if experts is not None:
            return attention + experts.linears(self.hidden)
        return [*attention, (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)]

    def _small(self, layer: int) -> int:
        """Norms, biases and what else is in a layer beside `linears` and its router."""
        q, kv, latent = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.latent
        found = 2 * self.hidden + self.hidden * self.out_bias
        if latent is not None:
            found += latent.q_rank + latent.rank + latent.expansion(self.heads)
            return found + (latent.q_rank + latent.width) * self.qkv_bias
        found += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return found + (2 * self.intermediate + self.hidden) * self.mlp_bias

    def weight_bytes(self, dtype: str, quantization: str = "auto", group: int = 64) -> int:
        """Bytes of the loaded weights. `quantization` and `group` as in `EngineConfig`: 'auto' is as stored, others
        quantize every linear layer to that format and the LM head to int8."""
        size = DTYPE_BYTES[dtype]
        stored = None if self.quantization is None or self.quantization.widened else self.quantization
        total = self.parameters * size + self.routers * (4 - size)
        if stored is None and quantization == "auto":
            return total
        if stored is not None:
            group = stored.group or 128
            if quantization == "auto" and stored.weights is not None and stored.scales is not None:
                return total - stored.weights * size + packed_bytes(stored.format, stored.weights, stored.scales)
        format = stored.format if stored is not None else quantization
        for outs, ins in self.linears:
            total += matrix_bytes(format, outs, ins, group) - outs * ins * size
        if quantization != "auto":
            total += matrix_bytes("int8", self.vocab, self.hidden, 0) - self.vocab * self.hidden * size
        return total

    def kv_bytes_per_token(self, dtype: str, kv_cache_dtype: str = "auto") -> int:
        """K and V of all layers for one token; a latent is both. int8 and fp8 have a float32 scale for each KV head's
        K, and one for its V."""
        vector = self.head_dim * DTYPE_BYTES[dtype] if kv_cache_dtype == "auto" else self.head_dim + 4
        return (2 if self.latent is None else 1) * self.layers * self.kv_heads * vector
