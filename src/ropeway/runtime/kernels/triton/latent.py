"""What latent attention does between its products, in one launch: norm, rotation, and putting q and k together."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ropeway.modelspec.latent import LatentSpec
from ropeway.runtime.layers.norm import RMSNorm


@triton.jit
def _fill_kernel(
    queries,
    tokens,
    norm,
    cos,
    sin,
    positions,
    q,
    k,
    heads,
    head_stride,
    query_stride,
    token_stride,
    eps,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program for each token and head, and one more for the token's key. BLOCK_RANK and BLOCK_HALF are powers of
    two, at least RANK and ROPE / 2."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = ROPE // 2
    width: tl.constexpr = RANK + ROPE
    if head < heads:
        source = queries + token * query_stride + head * head_stride
        target = q + (token * heads + head) * width
    else:
        source = tokens + token * token_stride + RANK
        target = k + token * width
        column = tl.arange(0, BLOCK_RANK)
        wide = tl.load(tokens + token * token_stride + column, mask=column < RANK, other=0.0).to(tl.float32)
        weight = tl.load(norm + column, mask=column < RANK, other=0.0)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
        # Rounded before the weight and after it, as models do.
        wide = wide.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
        tl.store(target + column, wide.to(weight.dtype), mask=column < RANK)
    lane = tl.arange(0, BLOCK_HALF)
    there = lane < half
    row = tl.load(positions + token) * half + lane
    c = tl.load(cos + row, mask=there, other=0.0)
    s = tl.load(sin + row, mask=there, other=0.0)
    if INTERLEAVED:
        first = lane * 2
        second = first + 1
    else:
        first = lane
        second = lane + half
    low = tl.load(source + first, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + second, mask=there, other=0.0).to(tl.float32)
    kind = q.dtype.element_ty
    tl.store(target + RANK + lane, (low * c - high * s).to(kind), mask=there)
    tl.store(target + RANK + half + lane, (high * c + low * s).to(kind), mask=there)


def fill(
    latent: LatentSpec,
    queries: Tensor,
    tokens: Tensor,
    norm: RMSNorm,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `layers.latent.Fill`."""
    count, heads, _ = queries.shape
    q, k = queries.new_empty((count, heads, latent.width)), queries.new_empty((count, 1, latent.width))
    _fill_kernel[(count, heads + 1)](
        queries[..., latent.nope :],
        tokens,
        norm.weight,
        *rotary,
        positions,
        q,
        k,
        heads,
        queries.stride(1),
        queries.stride(0),
        tokens.stride(0),
        norm.eps,
        RANK=latent.rank,
        ROPE=latent.rope,
        INTERLEAVED=latent.interleaved,
        BLOCK_RANK=triton.next_power_of_2(latent.rank),
        BLOCK_HALF=max(2, triton.next_power_of_2(latent.rope // 2)),
    )
    return q, k
