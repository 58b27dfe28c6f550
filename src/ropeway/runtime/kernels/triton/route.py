"""Choose the experts of each token: scores, groups, the best few and their weights, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.modelspec.experts import ExpertSpec


@triton.jit
def _best(order, number, experts):
    """The first lane with the highest of `order`; if that is NaN the last expert's."""
    return tl.minimum(tl.min(tl.where(order == tl.max(order, 0), number, experts), 0), experts - 1)


@triton.jit
def _route_kernel(
    logits,
    bias,
    weights,
    chosen,
    experts,
    each,
    kept,
    scale,
    EXPERTS: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One program for each token. EXPERTS and EACH are powers of two, at least `experts` and `each`. With GROUPS 1 all
    experts take part; a group counts as its GROUP_BEST (1 or 2) best experts."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, EXPERTS)
    there = number < experts
    logit = tl.load(logits + token * experts + number, mask=there, other=-float("inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    order = score
    if BIASED:
        order += tl.load(bias + number, mask=there, other=0.0)
    order = tl.where(there, order, -float("inf"))
    if GROUPS > 1:
        group = number // (experts // GROUPS)
        worth = tl.full((EXPERTS,), -float("inf"), dtype=tl.float32)
        for g in tl.static_range(GROUPS):
            mine = tl.where(group == g, order, -float("inf"))
            total = tl.max(mine, 0)
            if GROUP_BEST == 2:
                total += tl.max(tl.where(number == _best(mine, number, experts), -float("inf"), mine), 0)
            worth = tl.where((group == g) & there, total, worth)
        left = tl.where(there, 1, 0)
        for _turn in range(0, kept):
            taken = group == _best(worth, number, experts) // (experts // GROUPS)
            worth = tl.where(taken, -float("inf"), worth)
            left = tl.where(taken, 0, left)
        order = tl.where(left == 0, order, -float("inf"))

    rank = tl.arange(0, EACH)
    found = tl.zeros((EACH,), dtype=tl.float32)
    places = tl.zeros((EACH,), dtype=tl.int32)
    for r in range(0, each):
        place = _best(order, number, experts)
        found = tl.where(rank == r, tl.sum(tl.where(number == place, score, 0.0), 0), found)
        places = tl.where(rank == r, place, places)
        order = tl.where(number == place, -float("inf"), order)
    if NORMALIZE:
        found = found / (tl.sum(found, 0) + 1e-20)
    tl.store(weights + token * each + rank, found * scale, mask=rank < each)
    tl.store(chosen + token * each + rank, places.to(tl.int64), mask=rank < each)


def choose_experts(logits: Tensor, bias: Tensor | None, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """As `layers.moe.choose_experts`, and of experts that are equally good the first."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = torch.empty((tokens, spec.chosen), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, spec.chosen), dtype=torch.int64, device=logits.device)
    _route_kernel[(tokens,)](
        logits,
        logits if bias is None else bias,
        weights,
        chosen,
        experts,
        spec.chosen,
        spec.kept_groups,
        spec.scale,
        EXPERTS=max(2, triton.next_power_of_2(experts)),
        EACH=max(2, triton.next_power_of_2(spec.chosen)),
        GROUPS=spec.groups if spec.kept_groups < spec.groups else 1,
        GROUP_BEST=spec.group_best,
        SIGMOID=spec.scoring == "sigmoid",
        BIASED=bias is not None,
        NORMALIZE=spec.normalize,
        num_warps=1,
    )
    return weights, chosen
