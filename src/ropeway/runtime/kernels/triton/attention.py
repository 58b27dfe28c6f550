"""Paged attention in Triton: online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) over a cache
whose blocks lie anywhere.

A program computes BLOCK_M rows of one KV head: the query heads that share it (grouped-query attention) for as many
tokens as fit. So K and V are read once for a whole group, and even a single token fills the rows that a matrix unit
wants. Keys are walked in tiles at absolute positions, which need not have the size of a block. Where a step has single
tokens, their keys are split between several programs (FlashDecoding, Dao et al. 2023), and `combine` joins the parts.
"""

import triton
import triton.language as tl

from ropeway.runtime.kernels.triton.cache import from_fp8


@triton.jit
def walk(
    acc, peak, total, queries, tail, position, kv, scales, table, first_tile, last_tile, low, last, block_stride,
    value_offset, key_scales, value_scales, scale, softcap,
    D: tl.constexpr, MAIN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, CODED: tl.constexpr, UNIT: tl.constexpr,
    LATENT: tl.constexpr, OPERAND: tl.constexpr, WEIGHTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of tiles [first_tile, last_tile). Unless EDGE, every query sees all of them; else keys are in
    [low, last), up to each query's `position`, and within its window.

    `acc` (BLOCK_M, BLOCK_D) is the sum of weights times V so far, `total` that of weights, both relative to `peak`, the
    largest score in units of ln 2. Operands of the products are of type OPERAND, of those with weights WEIGHTS.
    """
    d = tl.arange(0, BLOCK_D)
    for tile in range(first_tile, last_tile):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if EDGE:
            real = (n >= low) & (n < last)
        else:
            real = n >= 0
        block = tl.load(table + n // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        offset = n % BLOCK_SIZE
        at = kv + (block * block_stride + offset * D)[:, None] + d[None, :]
        inside = real[:, None] & (d < MAIN)[None, :]
        keys = tl.load(at, mask=inside, other=0)
        if CODED == 2:
            keys = from_fp8(keys)
        scores = tl.dot(queries, tl.trans(keys.to(OPERAND)), input_precision="ieee")
        if D > MAIN:
            t = tl.arange(0, BLOCK_T)
            rest = tl.load(
                kv + (block * block_stride + offset * D + MAIN)[:, None] + t[None, :],
                mask=real[:, None] & (t < D - MAIN)[None, :],
                other=0,
            )
            if CODED == 2:
                rest = from_fp8(rest)
            scores = tl.dot(tail, tl.trans(rest.to(OPERAND)), scores, input_precision="ieee")
        if CODED > 0:
            at_scale = scales + block * (block_stride // 4) + offset
            units = tl.load(at_scale + key_scales, mask=real, other=0.0) * UNIT
            scores = scores * units[None, :]
        scores = scores * scale
        if CAPPED:
            # c * tanh(s / c), by the one transcendental function that the hardware has.
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap))))
            scores = scores * 1.4426950408889634
        if EDGE:
            seen = real[None, :] & (n[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        # A query may see nothing of a tile, nor of those before it.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        if LATENT:
            values = keys
        else:
            values = tl.load(at + value_offset, mask=inside, other=0)
            if CODED == 2:
                values = from_fp8(values)
            if CODED > 0:
                units = tl.load(at_scale + value_scales, mask=real, other=0.0) * UNIT
        if CODED > 0:
            weights = weights * units[None, :]
        acc = tl.dot(weights.to(WEIGHTS), values.to(WEIGHTS), acc, input_precision="ieee")
        peak = higher
    return acc, peak, total


# What differs from step to step must not make the compiler work again in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride", "splits", "least"],
    do_not_specialize_on_alignment=["tables", "cu_q", "starts", "rows", "before"],
)
def attend(
    q, kv, scales, out, parts, peaks, sums, tables, cu_q, starts, rows, before,
    q_stride, table_stride, block_stride, layer_offset, head_stride, value_offset, key_scales, value_scales,
    scale, softcap, splits, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, CODED: tl.constexpr, UNIT: tl.constexpr,
    LATENT: tl.constexpr, OPERAND: tl.constexpr, WEIGHTS: tl.constexpr, SINGLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program for each of: a block of queries, PART of the heads of a KV head, and a split of its keys.

    With SINGLE it computes rows of one token, and program b of the first axis is row b. Else it computes the others:
    `rows` says the row of block b, `before` the number of blocks before each row. `out` (T, KV_HEADS * GROUP * MAIN) is
    written unless SPLIT, else row r's `parts` (r, head, split, MAIN), `peaks` and `sums` (r, head, split), where there
    are `splits` of them. None but the last takes fewer than `least` tiles. Strides and offsets are in elements, those
    of scales in float32.
    """
    index = tl.program_id(0)
    column = tl.program_id(1)
    split = tl.program_id(2)
    QUERIES: tl.constexpr = BLOCK_M // PART
    if SINGLE:
        row = index
        first = 0
    else:
        row = tl.load(rows + index)
        first = (index - tl.load(before + row)) * QUERIES
    begin = tl.load(cu_q + row)
    count = tl.load(cu_q + row + 1) - begin
    if SINGLE:
        if count != 1:
            return
    else:
        if (count == 1) | (first >= count):
            return
    start = tl.load(starts + row)
    m = tl.arange(0, BLOCK_M)
    token = first + m // PART
    member = (column % PARTS) * PART + m % PART
    kv_head = column // PARTS
    head = kv_head * GROUP + member
    alive = (m < QUERIES * PART) & (token < count) & (member < GROUP)
    position = start + token

    last = start + tl.minimum(first + QUERIES, count)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(start + first - WINDOW + 1, 0)
    first_tile = low // BLOCK_N
    last_tile = tl.cdiv(last, BLOCK_N)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if SPLIT:
        share = tl.maximum(tl.cdiv(last_tile - first_tile, splits), least)
        first_tile = first_tile + split * share
        last_tile = tl.minimum(first_tile + share, last_tile)
        spot = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * splits + split
        if first_tile >= last_tile:
            tl.store(peaks + spot, peak, mask=alive)
            tl.store(sums + spot, total, mask=alive)
            return

    d = tl.arange(0, BLOCK_D)
    at = q + (begin + token).to(tl.int64)[:, None] * q_stride + head[:, None] * D
    queries = tl.load(at + d[None, :], mask=alive[:, None] & (d < MAIN)[None, :], other=0.0).to(OPERAND)
    tail = queries
    if D > MAIN:
        t = tl.arange(0, BLOCK_T)
        tail = tl.load(at + MAIN + t[None, :], mask=alive[:, None] & (t < D - MAIN)[None, :], other=0.0).to(OPERAND)
    edge = first_tile
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    offset = layer_offset + kv_head.to(tl.int64) * head_stride
    table = tables + row.to(tl.int64) * table_stride
    if WINDOW == 0:
        edge = tl.minimum(tl.maximum((start + first + 1) // BLOCK_N, first_tile), last_tile)
        acc, peak, total = walk(
            acc, peak, total, queries, tail, position, kv + offset, scales + offset // 4, table, first_tile, edge, low,
            last, block_stride, value_offset, key_scales, value_scales, scale, softcap, D, MAIN, BLOCK_D, BLOCK_T,
            BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, CODED, UNIT, LATENT, OPERAND, WEIGHTS, False,
        )  # fmt: skip
    acc, peak, total = walk(
        acc, peak, total, queries, tail, position, kv + offset, scales + offset // 4, table, edge, last_tile, low, last,
        block_stride, value_offset, key_scales, value_scales, scale, softcap, D, MAIN, BLOCK_D, BLOCK_T, BLOCK_N,
        BLOCK_SIZE, WINDOW, CAPPED, CODED, UNIT, LATENT, OPERAND, WEIGHTS, True,
    )  # fmt: skip
    wanted = alive[:, None] & (d < MAIN)[None, :]
    if SPLIT:
        tl.store(peaks + spot, peak, mask=alive)
        tl.store(sums + spot, total, mask=alive)
        tl.store(parts + spot[:, None] * MAIN + d[None, :], acc, mask=wanted)
    else:
        target = out + ((begin + token).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * MAIN + d[None, :]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["cu_q"])
def combine(
    parts, peaks, sums, out, cu_q, splits,
    HEADS: tl.constexpr, MAIN: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Join what the `splits` of a row's keys found, at most MOST: one program for each row of one token, head, and
    BLOCK_D elements."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(cu_q + row)
    if tl.load(cu_q + row + 1) - begin != 1:
        return
    s = tl.arange(0, MOST)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    spot = (row.to(tl.int64) * HEADS + head) * splits + s
    peak = tl.load(peaks + spot, mask=s < splits, other=float("-inf"))
    total = tl.load(sums + spot, mask=s < splits, other=0.0)
    # A split without keys has left no part. One of NaN alone has no peak either, but a NaN for its sum.
    there = total != 0.0
    weight = tl.where(there, tl.exp2(peak - tl.max(peak, axis=0)), 0.0)
    part = tl.load(parts + spot[:, None] * MAIN + d[None, :], mask=there[:, None] & (d < MAIN)[None, :], other=0.0)
    found = tl.sum(part * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    target = out + (begin.to(tl.int64) * HEADS + head) * MAIN + d
    tl.store(target, found.to(out.dtype.element_ty), mask=d < MAIN)
