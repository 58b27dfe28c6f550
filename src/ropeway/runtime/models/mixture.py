"""Decoders with experts in the place of some layers' MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from ropeway.modelspec.experts import ExpertSpec
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.mlp import GatedMLP
from ropeway.runtime.layers.moe import Choose, Experts, GroupedExperts, LoopedExperts, Router, SparseMLP, grouped_reason
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.models.llama import Llama
from ropeway.runtime.weights.loader import Weights


class StoredExperts:
    """The experts of one layer in a checkpoint, each by itself or stacked in two tensors of three dimensions (as
    transformers computes with them). `prefix` is that of their names."""

    def __init__(self, weights: Weights, prefix: str, spec: ExpertSpec, hidden: int) -> None:
        self._weights, self._prefix, self._spec, self._hidden = weights, prefix, spec, hidden
        self._gate_up = self._stack("gate_up_proj", (spec.count, 2 * spec.inner, hidden))
        self._down = self._stack("down_proj", (spec.count, hidden, spec.inner))

    def gate_up(self, experts: range) -> Tensor | QuantizedWeight:
        """Of each of `experts` the gate above its up: (len * 2 * inner, hidden)."""
        if self._gate_up is not None:
            return self._part(self._gate_up, experts)
        modules = [f"{self._prefix}{e}.{part}" for e in experts for part in self._spec.parts[:2]]
        return self._weights.linear(modules, [self._spec.inner] * len(modules), self._hidden)

    def down(self, experts: range) -> Tensor | QuantizedWeight:
        """(len * hidden, inner)."""
        if self._down is not None:
            return self._part(self._down, experts)
        modules = [f"{self._prefix}{e}.{self._spec.parts[2]}" for e in experts]
        return self._weights.linear(modules, [self._hidden] * len(modules), self._spec.inner)

    def _stack(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self._weights.take(self._prefix + name, shape) if self._weights.has(self._prefix + name) else None

    def _part(self, stack: Tensor, experts: range) -> Tensor | QuantizedWeight:
        return self._weights.quantize(stack[experts.start : experts.stop].flatten(0, 1))


class Mixture(Llama):
    """A decoder that `spec.experts` describes. The experts of a layer are grouped where that can be (see `layers.moe`),
    else computed one after the other."""

    def build_mlp(self, prefix: str, number: int) -> GatedMLP | SparseMLP:
        spec = self.spec.experts
        if spec is None or not spec.sparse[number]:
            return super().build_mlp(prefix, number)
        # transformers may write Mixtral's tensors under the name that all others have.
        block = "mlp" if self.weights.has(prefix + "mlp.gate.weight") else spec.block
        prefix = f"{prefix}{block}."
        experts = self.build_experts(StoredExperts(self.weights, prefix + "experts.", spec, self.spec.hidden), spec)
        self.capturable = self.capturable and experts.capturable
        shared = self.build_gated(prefix + "shared_experts.", spec.shared) if spec.shared else None
        return SparseMLP(self.build_router(prefix + "gate.", spec, experts.choose), experts, shared)

    def build_router(self, prefix: str, spec: ExpertSpec, choose: Choose) -> Router:
        weight = self.weights.raw(prefix + "weight", [(spec.count, self.spec.hidden)]).float()
        bias = None
        if spec.biased:
            bias = self.weights.raw(prefix + "e_score_correction_bias", [(spec.count,)]).float().to(self.device)
        product = PackedLinear(weight, None, self.device, dtype=torch.float32, level=self.level)
        return Router(product, bias, spec, choose)

    def build_experts(self, stored: StoredExperts, spec: ExpertSpec) -> Experts:
        experts: Experts
        everyone, first = range(spec.count), range(1)
        # Whether their format can be grouped shows in the first one, before all are read together.
        reason = grouped_reason(self.device)
        reason = reason or grouped_reason(self.device, [stored.gate_up(first), stored.down(first)])
        if reason is None:
            gate_up, down = (part.to(self.device) for part in (stored.gate_up(everyone), stored.down(everyone)))
            experts = GroupedExperts(gate_up, down, spec.count)
        else:
            each = [range(e, e + 1) for e in everyone]
            first_half = [self.pack(stored.gate_up(one), None) for one in each]
            experts = LoopedExperts(first_half, [self.pack(stored.down(one), None) for one in each], self.ops)
        self.note = self.note or self.describe(experts, spec, reason)
        return experts

    def describe(self, experts: Experts, spec: ExpertSpec, reason: str | None) -> str:
        """For the start-up banner; `reason` is why they are not grouped."""
        passed = f" (passed over: {reason})" if reason and self.device.type != "cpu" else ""
        return (
            f"Experts: {spec.chosen} of {spec.count} for each token, which so meets {self.spec.active_parameters:,} "
            f"parameters; computed {experts.name}{passed}."
        )
