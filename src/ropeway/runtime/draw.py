"""The sampler's rules in plain torch, on any device: what the native kernel does, step by step, for all rows at once.

Thresholds come from the few highest logits, or, where those do not reach far enough, from a bisection of the float32
values themselves; nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import SamplingParams
from ropeway.runtime.logits import adjust, keep_allowed, wants_adjusting
from ropeway.runtime.slots import Slot

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""
NOT_FINITE, NOTHING_LEFT = -1, -2
_FEW = 512
_BLOCK = 256
ALMOST = 1 - 1e-6
"""Rounding must not ask for a token more where equal ones make up top_p exactly."""


def draw(logits: Tensor, seats: Sequence[Slot | None], noise: NDArray[np.float64]) -> list[int]:
    """See `ropeway.runtime.sampler.Choose`."""
    adjusted = [
        (row, seat, seat.history)
        for row, seat in enumerate(seats)
        if seat is not None and seat.history is not None and wants_adjusting(seat.sampling, seat.generated)
    ]
    masked = [(row, seat.mask) for row, seat in enumerate(seats) if seat is not None and seat.mask is not None]
    rows = sorted({row for row, _, _ in adjusted} | {row for row, _ in masked})
    unsound = logits[rows].isnan().any(dim=1)  # before a ban hides it
    for row, seat, history in adjusted:
        adjust(logits[row], seat.sampling, seat.generated, history)
    for row, mask in masked:
        keep_allowed(logits[row], mask)
    best, tokens = _argmax(logits)
    tokens[~torch.isfinite(best)] = NOT_FINITE
    tokens[rows] = tokens[rows].masked_fill(best[rows] == -torch.inf, NOTHING_LEFT).masked_fill(unsound, NOT_FINITE)
    chosen: list[int] = tokens.tolist()
    samples = [
        (row, seat.sampling)
        for row, seat in enumerate(seats)
        if seat is not None and chosen[row] >= 0 and seat.sampling.temperature >= GREEDY_BELOW
    ]
    if samples:
        rows = [row for row, _ in samples]
        for row, token in zip(rows, _sample(logits[rows], [s for _, s in samples], noise[rows]), strict=True):
            chosen[row] = token
    return chosen


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.max(dim=1)
    # On ties torch names the first on the CPU; on CUDA that is not promised, so ask for it.
    return best, ids if logits.device.type == "cpu" else (logits == best[:, None]).int().argmax(dim=1)


def _sample(logits: Tensor, wishes: Sequence[SamplingParams], noise: NDArray[np.float64]) -> list[int]:
    """Truncate `logits` (n, vocab) in place, and draw."""

    def column(values: Sequence[float], rows: Sequence[int] | slice = slice(None)) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[rows, None]

    vocab = logits.shape[1]
    top = logits.amax(dim=1, keepdim=True)
    temperature = column([s.temperature for s in wishes])

    min_p = column([s.min_p for s in wishes])
    if min_p.any():
        logits.masked_fill_(logits < (top + temperature * min_p.log()).float(), -torch.inf)

    rows = [i for i, s in enumerate(wishes) if 0 < s.top_k < vocab]
    if rows:
        count = column([float(wishes[i].top_k) for i in rows])
        logits[rows] = _keep_highest(logits[rows], count, torch.ones_like)

    def weights(values: Tensor, rows: Sequence[int] | slice = slice(None)) -> Tensor:
        return ((values - top[rows]) / temperature[rows].float()).exp_()

    rows = [i for i, s in enumerate(wishes) if s.top_p < 1.0]
    if rows:
        part = logits[rows]
        share = column([wishes[i].top_p for i in rows]) * ALMOST
        total = weights(part, rows).sum(dim=1, keepdim=True, dtype=torch.float64)
        logits[rows] = _keep_highest(part, share * total, lambda values: weights(values, rows))
    tokens: list[int] = invert(weights(logits), torch.from_numpy(noise).to(logits.device)).tolist()
    return tokens


def _keep_highest(logits: Tensor, wanted: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    return keep_from(logits, _threshold(logits, wanted, weights), wanted, weights)


def keep_from(logits: Tensor, at: Tensor, wanted: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """`logits` (n, vocab) with -inf in place of all but the highest, whose weights reach `wanted` (n, 1): those above
    the threshold `at` (n, 1), and among its equals the lowest ids."""
    above = torch.where(logits > at, weights(logits), 0).sum(dim=1, keepdim=True, dtype=torch.float64)
    ties = ((wanted - above) / weights(at)).ceil().clamp(min=1)
    equal = logits == at
    kept = (logits > at) | (equal & (equal.cumsum(dim=1) <= ties))
    return logits.masked_fill(~kept, -torch.inf)


def _threshold(logits: Tensor, wanted: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """The highest value (n, 1) such that the weights of all logits from it upwards reach `wanted`."""
    few = logits.topk(min(_FEW, logits.shape[1]), dim=1).values
    reached = weights(few).cumsum(dim=1, dtype=torch.float64) >= wanted
    at = few.gather(1, reached.int().argmax(dim=1, keepdim=True))
    rest = (~reached.any(dim=1)).nonzero()[:, 0]
    if rest.numel():
        at[rest] = bisect(logits[rest], weights(logits)[rest], wanted[rest])
    return at


def bisect(logits: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The highest value (n, 1) such that the `weight` of all logits from it upwards reaches `wanted`, the lowest if
    nothing does: by the bits of the values, in as many rounds as a float32 has."""
    keys = _ordered((logits + 0.0).view(torch.int32))  # adding zero makes -0 equal to 0
    low, high = keys.amin(dim=1, keepdim=True).long(), keys.amax(dim=1, keepdim=True).long()
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = torch.where(keys >= middle, weight, 0).sum(dim=1, keepdim=True, dtype=torch.float64) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return _ordered(low.int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """From the bits of float32 numbers to integers in the same order, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Inverse CDF in the order of token ids, (n,) int64 of (n, vocab): find the block in which the noise falls, then
    the token in the block."""
    number, vocab = weights.shape
    blocks = -(-vocab // _BLOCK)
    split = torch.nn.functional.pad(weights, (0, blocks * _BLOCK - vocab)).view(number, blocks, _BLOCK)
    upto = split.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = noise * upto[:, -1]
    block = (upto <= target[:, None]).sum(dim=1).clamp_(max=blocks - 1)
    rows = torch.arange(number, device=weights.device)
    before = torch.where(block > 0, upto[rows, (block - 1).clamp(min=0)], 0.0)
    inside = split[rows, block].double()
    place = (before[:, None] + inside.cumsum(dim=1) <= target[:, None]).sum(dim=1)
    # The block's sum and the running sum inside it may round apart: never go beyond the last token with any weight.
    last = (_BLOCK - 1) - (inside > 0).flip(1).int().argmax(dim=1)
    return block * _BLOCK + torch.minimum(place, last)
