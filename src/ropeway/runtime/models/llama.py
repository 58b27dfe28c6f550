"""Llama 2, 3 and 3.x (Touvron et al. 2023): the decoder that the other families vary.

Parameter names are those of Hugging Face checkpoints. Everything is an argument: `forward` takes the step's inputs and
the KV store, and returns logits for the positions that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ropeway.modelspec import ModelSpec
from ropeway.runtime.attention.backend import AttentionBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.layers.attention import Attention
from ropeway.runtime.layers.embedding import Embedding
from ropeway.runtime.layers.latent import LatentAttention
from ropeway.runtime.layers.linear import FASTEST, PackedLinear
from ropeway.runtime.layers.mlp import GatedMLP
from ropeway.runtime.layers.moe import SparseMLP
from ropeway.runtime.layers.norm import RMSNorm
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.layers.rotary import rotary_tables
from ropeway.runtime.weights.loader import Weights


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention and MLP, each after a norm and added to the residual stream."""

    input_norm: RMSNorm
    attention: Attention | LatentAttention
    post_norm: RMSNorm
    mlp: GatedMLP | SparseMLP


class Llama:
    """`max_model_len` bounds the positions that the rotary tables are made for; `level` says how linear layers may be
    computed (see `layers.linear.choose`). `note` is a sentence for the start-up banner, '' for nothing; a step that is
    `capturable` never waits for the device, so that a CUDA graph can hold it."""

    note = ""
    capturable = True

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: AttentionBackend,
        ops: Ops,
        device: torch.device,
        max_model_len: int,
        level: int = FASTEST,
    ) -> None:
        self.spec, self.weights, self.backend, self.ops, self.device = spec, weights, backend, ops, device
        self.level = level
        embedding = weights.take("model.embed_tokens.weight", (spec.vocab, spec.hidden)).to(device)
        self.rotary = rotary_tables(spec.rope, spec.rotary_dim, spec.max_position, max_model_len, device)
        self.layers = [self.build_layer(f"model.layers.{i}.", i) for i in range(spec.layers)]
        self.norm = self.build_norm("model.norm.weight")
        if spec.tied:
            # One copy serves both: the embedding reads the head's packed weight by row.
            self.head = self.pack(weights.quantize(embedding, head=True), None, lookup=True)
            self.embed: Callable[[Tensor], Tensor] = self.head.rows
            weights.ignore(["lm_head.weight"])
        else:
            self.head = self.pack(weights.head("lm_head", spec.vocab, spec.hidden), None)
            self.embed = Embedding(embedding)
        weights.finish()
        del self.weights

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """Compute the step's tokens, write their K and V to `kv`, and return logits (E, vocab) float32."""
        return self.logits(self.hidden(inputs, kv))

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """The same as far as the head: the states (E, hidden) after the final norm."""
        meta = self.backend.prepare(inputs)
        residual = self.embed(inputs.token_ids)
        x = self.layers[0].input_norm(residual)
        for number, layer in enumerate(self.layers):
            if number:
                x = layer.input_norm.add(x, residual)
            x = layer.attention(x, self.rotary, inputs.positions, kv, meta)
            x = layer.post_norm.add(x, residual)
            x = layer.mlp(x)
        wanted = inputs.logits_rows
        return self.norm.add(x[wanted], residual[wanted]) if wanted.shape[0] else x[:0]

    def logits(self, states: Tensor) -> Tensor:
        """Logits (E, vocab) float32 of final states (E, hidden)."""
        if not states.shape[0]:
            return torch.empty((0, self.spec.vocab), device=self.device)
        return self.head(states).float()

    def build_layer(self, prefix: str, number: int) -> Layer:
        return Layer(
            input_norm=self.build_norm(prefix + "input_layernorm.weight"),
            attention=self.build_attention(prefix + "self_attn.", number),
            post_norm=self.build_norm(prefix + "post_attention_layernorm.weight"),
            mlp=self.build_mlp(prefix, number),
        )

    def build_attention(self, prefix: str, number: int) -> Attention | LatentAttention:
        spec = self.spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        qkv = self.build_linear(prefix, ["q_proj", "k_proj", "v_proj"], [q, kv, kv], spec.hidden, bias=spec.qkv_bias)
        out = self.build_linear(prefix, ["o_proj"], [spec.hidden], q, bias=spec.out_bias)
        norms = [self.build_norm(f"{prefix}{x}_norm.weight", spec.head_dim) for x in "qk"] if spec.qk_norm else []
        return Attention(spec, number, qkv, out, self.backend, self.ops, *norms)

    def build_mlp(self, prefix: str, number: int) -> GatedMLP | SparseMLP:
        return self.build_gated(prefix + "mlp.", self.spec.intermediate)

    def build_gated(self, prefix: str, inner: int) -> GatedMLP:
        spec = self.spec
        return GatedMLP(
            self.build_linear(prefix, ["gate_proj", "up_proj"], [inner, inner], spec.hidden, bias=spec.mlp_bias),
            self.build_linear(prefix, ["down_proj"], [spec.hidden], inner, bias=spec.mlp_bias),
            self.ops,
        )

    def build_norm(self, name: str, size: int | None = None) -> RMSNorm:
        weight = self.weights.take(name, (size or self.spec.hidden,)).to(self.device)
        return RMSNorm(weight, self.spec.norm_eps, self.ops)

    def build_linear(self, prefix: str, names: list[str], outs: list[int], ins: int, *, bias: bool) -> PackedLinear:
        """One linear layer out of the checkpoint's `names`, their outputs side by side."""
        weight = self.weights.linear([prefix + name for name in names], outs, ins)
        if not bias:
            return self.pack(weight, None)
        return self.pack(
            weight, self.weights.fuse([f"{prefix}{name}.bias" for name in names], [(out,) for out in outs])
        )

    def pack(self, weight: Tensor | QuantizedWeight, bias: Tensor | None, *, lookup: bool = False) -> PackedLinear:
        return PackedLinear(weight, bias, self.device, dtype=self.weights.dtype, lookup=lookup, level=self.level)
