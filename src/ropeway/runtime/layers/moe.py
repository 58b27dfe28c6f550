"""Mixtures of experts: a router chooses for each token a few of many gated MLPs, whose results are added up.

Two ways to compute the chosen experts stand behind one seam. `LoopedExperts` takes the experts one after the other,
each with the tokens that chose it, and works with whatever linear layers there are. `GroupedExperts` computes all of
them in a fixed number of Triton kernels and never asks the device how the tokens were divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ropeway.modelspec.experts import ExpertSpec
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.mlp import GatedMLP
from ropeway.runtime.layers.quantized import QuantizedWeight

_LEAST = 1e-20
Choose = Callable[[Tensor, Tensor | None, ExpertSpec], tuple[Tensor, Tensor]]
"""Logits (T, experts) float32, and a bias (experts,) float32 or None, to weights (T, k) float32 and experts (T, k)
int64, the best first."""


class Experts(Protocol):
    """All routed experts of one layer."""

    name: str
    capturable: bool
    """Whether a CUDA graph can hold it: it must not wait for the device."""

    @property
    def choose(self) -> Choose:
        """How routers choose where these experts are computed."""

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`x` (T, hidden), `weights` (T, k) float32 and `chosen` (T, k) int64, the experts of each token, to the
        weighted sum of what they make of it, (T, hidden). A row's result depends on that row alone."""


class Router:
    """Chooses the experts of each token. Computed in float32, whatever the model's dtype: which of two nearly equal
    experts is better decides as much as which of two tokens."""

    def __init__(self, product: PackedLinear, bias: Tensor | None, spec: ExpertSpec, choose: Choose) -> None:
        """`product` is (experts, hidden) in float32, `bias` (experts,) float32 that of a biased router."""
        self.product, self.bias, self.spec, self.choose = product, bias, spec, choose

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (T, hidden) to weights (T, k) float32 and experts (T, k) int64."""
        return self.choose(self.product(x.float()), self.bias, self.spec)


def choose_experts(logits: Tensor, bias: Tensor | None, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """`Choose` in plain torch."""
    scores = logits.sigmoid() if spec.scoring == "sigmoid" else logits.softmax(-1)
    order = scores if bias is None else scores + bias
    if spec.kept_groups < spec.groups:
        grouped = order.view(order.shape[0], spec.groups, -1)
        best = grouped.topk(spec.group_best, dim=-1).values.sum(-1)
        kept = best.topk(spec.kept_groups, dim=-1).indices
        outside = torch.full_like(best, -torch.inf).scatter_(1, kept, 0.0)
        order = (grouped + outside[..., None]).flatten(1)
    chosen = order.topk(spec.chosen, dim=-1).indices
    weights = scores.gather(1, chosen)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _LEAST)
    return weights * spec.scale, chosen


class LoopedExperts:
    """Experts as linear layers of their own, computed one after the other for the tokens that chose them. Experts that
    nobody chose cost nothing."""

    name = "one after the other"

    def __init__(self, gate_up: Sequence[PackedLinear], down: Sequence[PackedLinear], ops: Ops) -> None:
        self.gate_up, self.down, self.ops = gate_up, down, ops
        self.capturable, self.choose = False, choose_experts

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        tokens, each = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.down)).tolist()
        gathered = x[order // each]
        results, first = [], 0
        for gate_up, down, count in zip(self.gate_up, self.down, counts, strict=True):
            if count:
                results.append(down(self.ops.silu_mul(gate_up(gathered[first : first + count]))))
                first += count
        # Each token adds up its own experts, the best first, so its sum does not depend on its neighbours.
        own = torch.cat(results)[order.argsort()].view(tokens, each, -1)
        return torch.bmm(weights[:, None], own.float())[:, 0].to(x.dtype)


class GroupedExperts:
    """Experts in stacked weights, computed together by Triton kernels; see kernels/triton/moe.py."""

    name = "grouped by Triton"
    capturable = True

    def __init__(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight, count: int) -> None:
        """`gate_up` (count * 2 * inner, hidden), each expert's gate above its up, and `down` (count * hidden, inner),
        in a format of which `grouped_reason` says nothing."""
        from ropeway.runtime.kernels.triton import moe, route  # late: only a GPU, or a test, needs Triton

        self._moe, self.choose = moe, route.choose_experts
        self._gate_up, self._down = moe.stack(gate_up, count), moe.stack(down, count)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._moe.mixture(x, weights, chosen, self._gate_up, self._down)


def grouped_reason(device: torch.device, weights: Sequence[Tensor | QuantizedWeight] = ()) -> str | None:
    """None if `GroupedExperts` can compute `weights` on `device`, else the reason why not."""
    if device.type != "cuda":
        return f"grouped kernels run on CUDA, not on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return next((reason for reason in (_reason(weight, device) for weight in weights) if reason), None)


def _reason(weight: Tensor | QuantizedWeight, device: torch.device) -> str | None:
    if not isinstance(weight, QuantizedWeight):
        return None
    depth = weight.values.shape[1]
    if weight.order is not None:
        return "grouped kernels know no act-order"
    if weight.format == "int4":
        known = weight.group % 32 == 0 and depth % 64 == 0
        return None if known else f"grouped kernels take 64 input features of int4 at once, which do not divide {depth}"
    if weight.group % 64:
        return f"grouped kernels take 64 input features at once, which do not divide groups of {weight.group}"
    if weight.format == "fp8" and not _knows_fp8(device):
        return "this GPU does not read fp8"
    return None


def _knows_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


class SparseMLP:
    """The feed-forward part of a layer with experts; `shared` is the one that every token goes through, if any."""

    def __init__(self, router: Router, experts: Experts, shared: GatedMLP | None = None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(self, x: Tensor) -> Tensor:
        """(T, hidden) to (T, hidden)."""
        y = self.experts(x, *self.router(x))
        return y if self.shared is None else y + self.shared(x)
