"""The experts of a mixture, computed together: a grouped product in which every tile belongs to one expert.

Nothing here waits for the device. How many tokens each expert has is known there alone, so the grid is as large as any
division of the tokens could need, and programs beyond what this one needs return at once. Four launches make a layer:

1. `_order_kernel` sorts the pairs (token, rank of one of its experts) by expert: one program for each expert counts who
   comes before it, then writes its own pairs in order. The sort is stable, so the same choice gives the same layout.
2. `_expert_kernel` with FIRST: gate and up side by side in two accumulators, silu(gate) * up, rows gathered by pair.
3. `_expert_kernel` again: the product that leads back, each row to the place of its pair. (`_int4_kernel` for int4.)
4. `_combine_kernel`: each token's weighted sum in float32, in the order of its ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.layers.quantized import QuantizedWeight, checked


@triton.jit(do_not_specialize=["pairs"])
def _order_kernel(chosen, order, counts, pairs, BLOCK: tl.constexpr):
    """`chosen` (pairs,) experts to `order` (pairs,), pairs sorted by expert, and `counts` (experts,)."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    below = 0
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        found = tl.load(chosen + pair, mask=pair < pairs, other=0)
        below += tl.sum(((found < expert) & (pair < pairs)).to(tl.int32), 0)
    place = below
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        found = tl.load(chosen + pair, mask=pair < pairs, other=0)
        mine = ((found == expert) & (pair < pairs)).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - mine, pair, mask=mine == 1)
        place += tl.sum(mine, 0)
    tl.store(counts + expert, place - below)


@triton.jit
def _rows(order, counts, experts, each, EXPERTS: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of this program's block: the expert (`experts` or more if there is no such block), the rows of x that it reads,
    those of the result that it writes, and which of them there are. EXPERTS is a power of two, at least `experts`."""
    number = tl.arange(0, EXPERTS)
    held = tl.load(counts + number, mask=number < experts, other=0)
    blocks = (held + BLOCK_M - 1) // BLOCK_M
    block = tl.program_id(0)
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    first = tl.sum(tl.where(number < expert, held, 0), 0)
    count = tl.sum(tl.where(number == expert, held, 0), 0)
    row = (block - tl.sum(tl.where(number < expert, blocks, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = row < count
    pair = tl.load(order + first + row, mask=used, other=0)
    if FIRST:
        source = pair // each
        target = first + row
    else:
        source = first + row
        target = pair
    return expert, source.to(tl.int64), target.to(tl.int64), used


@triton.jit
def _write(total, up, out_at, mask, FIRST: tl.constexpr):
    """Store `total`, or silu(total) * up, rounded where the layers round that are computed one by one."""
    kind = out_at.dtype.element_ty
    if FIRST:
        total = total.to(kind).to(tl.float32)
        total = (total / (1.0 + tl.exp(-total))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    tl.store(out_at, total.to(kind), mask=mask)


@triton.jit
def _expert_kernel(
    x,
    weight,
    scale,
    out,
    order,
    counts,
    experts,
    columns,
    depth,
    group,
    each,
    x_stride,
    out_stride,
    EXPERTS: tl.constexpr,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one expert's product with `weight` (experts, rows, depth), whose rows are `columns`, or twice that if
    FIRST: then the lower half is `up`, and `x` is read by token and `out` written in sorted order; otherwise the other
    way round. If SCALED, `scale` (experts, rows) belongs to the weight, or if GROUPED (experts, rows, depth / group),
    where BLOCK_K divides `group`."""
    expert, source, target, used = _rows(order, counts, experts, each, EXPERTS, FIRST, BLOCK_M)
    if expert >= experts:
        return
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = column < columns
    rows = columns * 2 if FIRST else columns
    base = expert.to(tl.int64) * rows
    lane = tl.arange(0, BLOCK_K)
    x_at = x + source[:, None] * x_stride + lane[None, :]
    row, up_row = base + column, base + columns + column
    weight_at = weight + row[None, :] * depth + lane[:, None]
    up_at = weight + up_row[None, :] * depth + lane[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    groups = (depth + group - 1) // group
    for start in range(0, depth, BLOCK_K):
        inside = start + lane < depth
        part = tl.load(x_at + start, mask=used[:, None] & inside[None, :], other=0.0)
        tile = inside[:, None] & wanted[None, :]
        values = tl.load(weight_at + start, mask=tile, other=0.0).to(part.dtype)
        if GROUPED:
            scales = tl.load(scale + row * groups + start // group, mask=wanted, other=0.0)
            total += tl.dot(part, values, input_precision="ieee") * scales[None, :]
        else:
            total = tl.dot(part, values, total, input_precision="ieee")
        if FIRST:
            values = tl.load(up_at + start, mask=tile, other=0.0).to(part.dtype)
            if GROUPED:
                scales = tl.load(scale + up_row * groups + start // group, mask=wanted, other=0.0)
                up += tl.dot(part, values, input_precision="ieee") * scales[None, :]
            else:
                up = tl.dot(part, values, up, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + row, mask=wanted, other=0.0)[None, :]
        if FIRST:
            up *= tl.load(scale + up_row, mask=wanted, other=0.0)[None, :]
    out_at = out + target[:, None] * out_stride + column[None, :]
    _write(total, up, out_at, used[:, None] & wanted[None, :], FIRST)


@triton.jit
def _int4_sum(total, low, high, packed_at, scale_at, zero_at, start, group, wanted):
    """`total` and `low` and `high` (BLOCK_M, 32), inputs [start, start + 32) and the 32 after them, times a tile of the
    weight: `packed_at` (32, BLOCK_N) are pairs of nibbles 32 inputs apart, `scale_at` and `zero_at` (BLOCK_N,) the
    first group of each row."""
    packed = tl.load(packed_at, mask=wanted[None, :], other=0)
    near, far = start // group, (start + 32) // group
    scale = tl.load(scale_at + near, mask=wanted, other=0.0).to(tl.float32)
    zero = tl.load(zero_at + near, mask=wanted, other=0).to(tl.float32)
    values = ((packed & 15).to(tl.float32) - zero[None, :]) * scale[None, :]
    total = tl.dot(low, values.to(low.dtype), total, input_precision="ieee")
    scale = tl.load(scale_at + far, mask=wanted, other=0.0).to(tl.float32)
    zero = tl.load(zero_at + far, mask=wanted, other=0).to(tl.float32)
    values = ((packed >> 4).to(tl.float32) - zero[None, :]) * scale[None, :]
    return tl.dot(high, values.to(high.dtype), total, input_precision="ieee")


@triton.jit
def _int4_kernel(
    x,
    packed,
    scale,
    zero,
    out,
    order,
    counts,
    experts,
    columns,
    depth,
    group,
    each,
    x_stride,
    out_stride,
    EXPERTS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `_expert_kernel` with weights in int4: `packed` (experts, rows, depth / 2), see `stack`, `scale` and `zero`
    (experts, rows, depth / group). Steps are of 64 inputs, which divide `depth`."""
    expert, source, target, used = _rows(order, counts, experts, each, EXPERTS, FIRST, BLOCK_M)
    if expert >= experts:
        return
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = column < columns
    rows = columns * 2 if FIRST else columns
    base = expert.to(tl.int64) * rows
    lane = tl.arange(0, 32)
    x_at = x + source[:, None] * x_stride + lane[None, :]
    row, up_row = base + column, base + columns + column
    packed_at = packed + row[None, :] * (depth // 2) + lane[:, None]
    up_at = packed + up_row[None, :] * (depth // 2) + lane[:, None]
    groups = depth // group
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, 64):
        low = tl.load(x_at + start, mask=used[:, None], other=0.0)
        high = tl.load(x_at + start + 32, mask=used[:, None], other=0.0)
        half = start // 2
        total = _int4_sum(
            total, low, high, packed_at + half, scale + row * groups, zero + row * groups, start, group, wanted
        )
        if FIRST:
            up = _int4_sum(
                up, low, high, up_at + half, scale + up_row * groups, zero + up_row * groups, start, group, wanted
            )
    out_at = out + target[:, None] * out_stride + column[None, :]
    _write(total, up, out_at, used[:, None] & wanted[None, :], FIRST)


@triton.jit
def _combine_kernel(parts, weights, out, hidden, each, BLOCK: tl.constexpr):
    """`parts` (tokens * each, hidden) times `weights` (tokens, each), summed to `out` (tokens, hidden)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in range(0, each):
        part = tl.load(parts + (token * each + rank) * hidden + column, mask=wanted, other=0.0)
        total += part.to(tl.float32) * tl.load(weights + token * each + rank)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class Stacked:
    """The same matrix of all experts, contiguous.

    `values` (experts, rows, depth), in x's type or, with `scales` (experts, rows, groups) float32, of one byte; one
    group if `group` is 0. Or int4: `values` (experts, rows, depth / 2), with `scales` float16 and `zeros` uint8.
    """

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0

    @property
    def depth(self) -> int:
        return self.values.shape[2] * (1 if self.zeros is None else 2)


def stack(weight: Tensor | QuantizedWeight, experts: int) -> Stacked:
    """`weight` (experts * rows, depth) expert by expert. Of an int4 weight each byte gets two values that are 32 inputs
    apart, so that a kernel multiplies either half as it is."""
    if not isinstance(weight, QuantizedWeight):
        return Stacked(_by_expert(weight, experts))
    weight = checked(weight)
    if weight.format != "int4":
        scales = weight.scales.float().view(weight.values.shape[0], -1)
        return Stacked(_by_expert(weight.values, experts), _by_expert(scales, experts), group=weight.group)
    low, high = weight.values.view(weight.values.shape[0], -1, 2, 32).unbind(2)
    zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    return Stacked(
        _by_expert((low | (high << 4)).flatten(1), experts),
        _by_expert(weight.scales.half(), experts),
        _by_expert(zeros, experts),
        weight.group,
    )


def _by_expert(tensor: Tensor, experts: int) -> Tensor:
    return tensor.contiguous().view(experts, -1, tensor.shape[1])


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a product, and how Triton is to compile it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def choose_tiles(pairs: int, experts: int, itemsize: int, *, first: bool) -> Tiles:
    """By the tokens that an expert has on average. With few of them a product waits for its weights: many small tiles
    keep more reads under way. With many it is bound by arithmetic and wants large tiles; two accumulators in the first
    product halve its width. Reasoned from shared memory and registers of sm_80 and sm_90, not yet tuned on hardware."""
    average = -(-pairs // experts)
    depth = 128 // itemsize if itemsize > 1 else 64
    if average <= 16:
        return Tiles(16, 64, depth, 4, 4)
    if average <= 64:
        return Tiles(32 if average <= 32 else 64, 64 if first else 128, depth, 4, 3)
    return Tiles(128, 64 if first else 128, depth, 8, 3)


def most_blocks(pairs: int, experts: int, size: int) -> int:
    """Blocks of `size` rows of one expert each that `pairs` pairs fill at most, however they are divided."""
    used = min(pairs, experts)
    return used + (pairs - used) // size


def mixture(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Stacked, down: Stacked) -> Tensor:
    """As `layers.moe.Experts`: `x` (T, hidden), `weights` (T, k) float32 and `chosen` (T, k) to (T, hidden).

    `gate_up` is (experts, 2 * inner, hidden), `down` (experts, hidden, inner).
    """
    x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
    tokens, each = chosen.shape
    experts, hidden, _ = down.values.shape
    pairs, inner = tokens * each, down.depth
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    _order_kernel[(experts,)](chosen, order, counts, pairs, BLOCK=256 if pairs <= 256 else 1024)

    between = x.new_empty((pairs, inner))
    _product(x, gate_up, between, order, counts, each, first=True)
    parts = x.new_empty((pairs, hidden))
    _product(between, down, parts, order, counts, each, first=False)
    out = torch.empty_like(x)
    size = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(tokens, triton.cdiv(hidden, size))](parts, weights, out, hidden, each, BLOCK=size)
    return out


def _product(x: Tensor, weight: Stacked, out: Tensor, order: Tensor, counts: Tensor, each: int, *, first: bool) -> None:
    experts, (pairs, columns) = weight.values.shape[0], out.shape
    tiles = choose_tiles(pairs, experts, x.element_size(), first=first)
    grid = (most_blocks(pairs, experts, tiles.m), triton.cdiv(columns, tiles.n))
    sizes = (out, order, counts, experts, columns, weight.depth)
    strides = (each, x.stride(0), out.stride(0))
    shape = {
        "EXPERTS": max(2, triton.next_power_of_2(experts)), "FIRST": first, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    if weight.zeros is not None:
        _int4_kernel[grid](x, weight.values, weight.scales, weight.zeros, *sizes, weight.group, *strides, **shape)
        return
    scales = weight.values if weight.scales is None else weight.scales  # not read if there are none
    _expert_kernel[grid](
        x, weight.values, scales, *sizes, weight.group or weight.depth, *strides,
        SCALED=weight.scales is not None and not weight.group, GROUPED=weight.group > 0, BLOCK_K=tiles.k, **shape,
    )  # fmt: skip
