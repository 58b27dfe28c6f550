"""Tokens for rows of logits on the device that has them, without waiting for it: what a step needs if the next one is
to begin before the host has heard of its tokens.

The rules and their numbers are those of `runtime/draw.py`. Rows here ask for nothing but temperature, top_k, top_p and
min_p.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ropeway.runtime.draw import ALMOST, GREEDY_BELOW, NOT_FINITE, bisect, invert, keep_from


class Sample(Protocol):
    """See `sample`."""

    def __call__(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, noise: Tensor
    ) -> Tensor: ...


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, noise: Tensor) -> Tensor:
    """A token for each row of `logits` (R, vocab) float32, as (R,) int64; NOT_FINITE for a row with NaN, +inf or no
    finite logit.

    `temperature`, `top_p`, `min_p` and `noise` (see `runtime.noise`) are (R,) float64, `top_k` (R,) int64 with 0 for no
    limit. Temperatures below GREEDY_BELOW take the best, the lowest id among equals. Nothing here waits for the device
    or depends on what it has computed, so that it can be captured in a graph. `logits` stay as they are.
    """
    return _implementation(logits.device.type)(logits, temperature, top_k, top_p, min_p, noise)


@functools.cache
def _implementation(device_type: str) -> Sample:
    if device_type == "cuda" and find_spec("triton"):
        from ropeway.runtime.kernels.triton import sample as kernels

        return kernels.sample
    return sample_torch


def sample_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, noise: Tensor
) -> Tensor:
    """`sample` in plain torch. Thresholds are bisected, which reads all logits once for each bit of a float32."""
    vocab = logits.shape[1]
    top = logits.amax(dim=1, keepdim=True)
    scale = temperature[:, None].clamp(min=GREEDY_BELOW)

    def weights(values: Tensor) -> Tensor:
        return ((values - top) / scale.float()).exp_()

    kept = logits.masked_fill(logits < (top + scale * min_p[:, None].log()).float(), -torch.inf)
    count = top_k[:, None].double()
    count = torch.where((count > 0) & (count < vocab), count, torch.inf)
    kept = keep_from(kept, bisect(kept, torch.ones_like(kept), count), count, torch.ones_like)
    total = weights(kept).sum(dim=1, keepdim=True, dtype=torch.float64)
    share = torch.where(top_p[:, None] < 1, top_p[:, None] * ALMOST * total, torch.inf)
    kept = keep_from(kept, bisect(kept, weights(kept), share), share, weights)
    best = (logits == top).int().argmax(dim=1)
    tokens = torch.where(temperature < GREEDY_BELOW, best, invert(weights(kept), noise))
    return torch.where(top[:, 0].isfinite(), tokens, NOT_FINITE)
