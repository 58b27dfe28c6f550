"""Routers choose as their papers say, and experts that are computed one after the other are the weighted sum."""

from __future__ import annotations

import math

import pytest
import torch

from ropeway.modelspec.experts import ExpertSpec
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.moe import LoopedExperts, Router, choose_experts

HIDDEN, INNER, TOKENS = 24, 16, 13
SPECS = {
    "softmax": ExpertSpec(count=5, chosen=2, inner=INNER, sparse=(True,)),
    "not normalized": ExpertSpec(count=5, chosen=3, inner=INNER, sparse=(True,), normalize=False, scale=1.5),
    "one": ExpertSpec(count=4, chosen=1, inner=INNER, sparse=(True,)),
    "all": ExpertSpec(count=4, chosen=4, inner=INNER, sparse=(True,)),
    "groups": ExpertSpec(
        count=12, chosen=3, inner=INNER, sparse=(True,), groups=4, kept_groups=2, normalize=False, scale=16.0
    ),
    "sigmoid": ExpertSpec(
        count=12, chosen=4, inner=INNER, sparse=(True,), scoring="sigmoid", biased=True, groups=3, kept_groups=2,
        group_best=2, scale=2.5,
    ),
}  # fmt: skip


def by_hand(spec: ExpertSpec, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Weights of the chosen experts of one token, by the definition."""
    if spec.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    order = [score + more for score, more in zip(scores, bias, strict=True)]
    size = spec.count // spec.groups
    groups = [order[g * size : (g + 1) * size] for g in range(spec.groups)]
    best = sorted(range(spec.groups), key=lambda g: -sum(sorted(groups[g])[-spec.group_best :]))[: spec.kept_groups]
    allowed = [e for e in range(spec.count) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -order[e])[: spec.chosen]
    norm = sum(scores[e] for e in chosen) if spec.normalize else 1.0
    return {e: spec.scale * scores[e] / norm for e in chosen}


@pytest.mark.parametrize("name", SPECS)
def test_router(name: str) -> None:
    spec = SPECS[name]
    torch.manual_seed(1)
    weight, bias = torch.randn(spec.count, HIDDEN), torch.randn(spec.count) if spec.biased else None
    x = torch.randn(200, HIDDEN) / 3
    weights, chosen = Router(PackedLinear(weight), bias, spec, choose_experts)(x)
    logits = (x.double() @ weight.double().T).tolist()
    for row in range(200):
        found = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        more = [0.0] * spec.count if bias is None else bias.tolist()
        assert found == pytest.approx(by_hand(spec, logits[row], more), rel=1e-5)


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_the_weighted_sum(dtype: torch.dtype, level: int) -> None:
    torch.manual_seed(2)
    count, each = 6, 3
    gate_up = torch.randn(count, 2 * INNER, HIDDEN).to(dtype)
    down = torch.randn(count, HIDDEN, INNER).to(dtype)
    layer = LoopedExperts(
        [PackedLinear(w, level=level) for w in gate_up], [PackedLinear(w, level=level) for w in down], TorchOps()
    )
    x, weights = torch.randn(TOKENS, HIDDEN).to(dtype), torch.rand(TOKENS, each)
    chosen = torch.stack([torch.randperm(count - 1)[:each] for _ in range(TOKENS)])  # nobody chooses the last
    found = layer(x, weights, chosen)
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for weight, e in zip(weights[token].double(), chosen[token].tolist(), strict=True):
            gate, up = (gate_up[e].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (down[e].double() @ (torch.nn.functional.silu(gate) * up))
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.double() - expected).abs().max() / expected.abs().max() < allowed
    for token in (0, 5, TOKENS - 1):
        alone = layer(x[token : token + 1], weights[token : token + 1], chosen[token : token + 1])
        torch.testing.assert_close(alone[0], found[token], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)
