"""One launch for all between the q/k/v product and attention: norms of heads, rotary embedding, K and V into the cache.

Apart they would read and write q and k three times, in four launches; here each is read once and written once, and K
only into the cache. A cache of int8 or fp8 holds codes and a float32 scale for each vector: x is about code * scale.
fp8 is e4m3, made and read by integer arithmetic on bits, so that it needs no instruction of the newest GPUs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.rotation import Rotation

CODES = {"auto": 0, "int8": 1, "fp8": 2}
"""How the kernels name what the cache holds: plain elements, or codes."""
UNIT = {"auto": 1.0, "int8": 1.0, "fp8": 256.0}
"""What codes are to be multiplied by beside their scale, see `from_fp8`."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's names for the types of a model."""


@triton.jit
def to_codes(x, KIND: tl.constexpr):
    """Float32 rows (H, D) as codes, and the scale of each row. A NaN or an infinity makes a row's scale NaN, and so
    every element that is read back, whatever the codes are."""
    # The maximum passes over NaN, the sum does not.
    largest = tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)
    if KIND == 1:
        scale = tl.div_rn(largest, 127.0)
    else:
        scale = tl.div_rn(largest, 448.0)
    y = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)[:, None])
    if KIND == 1:
        # Adding 1.5 * 2^23 leaves no bits behind the point: half to even, by the adder itself.
        codes = ((y + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8)
    else:
        bits = y.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Three bits of mantissa stay, half to even; the exponent's bias falls from 127 to 7.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        # Below 2^-6 codes count in steps of 2^-9, which is the last bit of 2^14 plus them.
        small = (tl.abs(y) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        codes = (tl.where(tl.abs(y) < 0.015625, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes, scale


@triton.jit
def from_fp8(codes):
    """e4m3 numbers in float16, 256 times too small (see `UNIT`): the same bits where exponents have a bias of 15
    instead of 7."""
    bits = codes.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def normed(x, factor, weight, KIND: tl.constexpr):
    """x * factor, rounded to the model's type KIND, times `weight`, rounded again, as Hugging Face models do."""
    rounded = (x * factor[:, None]).to(KIND).to(tl.float32)
    return (rounded * weight[None, :].to(tl.float32)).to(KIND).to(tl.float32)


@triton.jit
def turned(
    x, stride, token, head, there, positions, weight, eps, cos, sin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Heads `head` of tokens `token` (R,), as float32 (R, BLOCK_D) that KIND can hold: normalised if NORM, and rotated
    unless HALF is 0. Dimension i < HALF turns with i + HALF. Where not `there` and outside D there are zeros."""
    d = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (d < D)[None, :]
    at = x + (token * stride + head * D)[:, None]
    found = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(found * found, axis=1) / D + eps)
        found = normed(found, factor, tl.load(weight + d, mask=d < D, other=0.0), KIND)
    if HALF > 0:
        low = d < HALF
        turning = there[:, None] & (d < 2 * HALF)[None, :]
        partner = tl.where(low, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        # Loaded again rather than moved between threads: it is in the nearest cache.
        other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            other = normed(other, factor, tl.load(weight + partner, mask=d < D, other=0.0), KIND)
        position = tl.load(positions + token, mask=there, other=0).to(tl.int64)
        angle = position[:, None] * HALF + tl.where(low, d, d - HALF)[None, :]
        c = tl.load(cos + angle, mask=turning, other=1.0)
        s = tl.load(sin + angle, mask=turning, other=0.0)
        found = (found * c + other * tl.where(low[None, :], -s, s)).to(KIND).to(tl.float32)
    return found


# What differs from step to step must not make the compiler work again in the middle of serving.
@triton.jit(do_not_specialize=["tokens", "q_programs"], do_not_specialize_on_alignment=["slots", "positions"])
def write_kernel(
    q, k, v, q_out, kv, scales, slots, positions, cos, sin, q_weight, k_weight, q_eps, k_eps, tokens, q_programs,
    q_stride, k_stride, v_stride, block_stride, layer_offset, head_stride, value_offset, key_scales, value_scales,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, VALUES: tl.constexpr, CODED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The first `q_programs` programs turn BLOCK_R query heads each, of one token after the other; the others turn and
    store K, and store V, of as many KV heads. VALUES is False where V is a part of K. Strides and offsets are in
    elements, those of scales in float32."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    if program < q_programs:
        pair = program * BLOCK_R + tl.arange(0, BLOCK_R)
        wanted = pair < tokens * HEADS
        x = turned(
            q, q_stride, (pair // HEADS).to(tl.int64), pair % HEADS, wanted, positions, q_weight, q_eps, cos, sin, D,
            BLOCK_D, HALF, NORM, KIND,
        )  # fmt: skip
        at = q_out + pair.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, x.to(KIND), mask=wanted[:, None] & (d < D)[None, :])
    else:
        # Other names than above: a name that both branches define would have to mean the same type in both.
        owner = (program - q_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
        there = owner < tokens * KV_HEADS
        token = (owner // KV_HEADS).to(tl.int64)
        head = owner % KV_HEADS
        inside = there[:, None] & (d < D)[None, :]
        slot = tl.load(slots + token, mask=there, other=0).to(tl.int64)
        offset = slot % BLOCK_SIZE
        base = (slot // BLOCK_SIZE) * block_stride + layer_offset + head * head_stride
        key = turned(
            k, k_stride, token, head, there, positions, k_weight, k_eps, cos, sin, D, BLOCK_D, HALF, NORM, KIND
        )
        spot = kv + (base + offset * D)[:, None] + d[None, :]
        if CODED > 0:
            codes, scale = to_codes(key, CODED)
            tl.store(spot, codes, mask=inside)
            tl.store(scales + base // 4 + key_scales + offset, scale, mask=there)
        else:
            tl.store(spot, key.to(KIND), mask=inside)
        if VALUES:
            value = tl.load(v + (token * v_stride + head * D)[:, None] + d[None, :], mask=inside, other=0.0)
            if CODED > 0:
                value_codes, value_scale = to_codes(value.to(tl.float32), CODED)
                tl.store(spot + value_offset, value_codes, mask=inside)
                tl.store(scales + base // 4 + value_scales + offset, value_scale, mask=there)
            else:
                tl.store(spot + value_offset, value, mask=inside)


@dataclass(frozen=True)
class Layout:
    """Where things lie inside one layer of one block, in elements of the cache: KV head h begins at h * `head` with its
    K, (block_size, head_dim), and its V lies `value` elements later. Scales, if any, are at `key_scales` and
    `value_scales` float32s from the head's beginning, one for each token."""

    head: int
    value: int
    key_scales: int = 0
    value_scales: int = 0


def by_head(spec: AttentionSpec) -> Layout:
    """All of a KV head together: its K, its V unless that is a part of K, then the scales."""
    vector = spec.block_size * spec.head_dim
    elements = spec.vectors * (vector + spec.block_size * spec.scale_bytes)
    scales = spec.vectors * vector // 4
    return Layout(elements, vector, scales, scales + spec.block_size)


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int,
    slots: Tensor,
    spec: AttentionSpec,
    layout: Layout,
    rotation: Rotation | None,
) -> Tensor:
    """Store K and V of a step's tokens, rotated as `rotation` says, and return the queries rotated in the same way, in
    a new tensor (or `q` itself if there is nothing to do). Shapes are those of `AttentionBackend.forward`."""
    tokens = q.shape[0]
    block_d = max(16, triton.next_power_of_2(spec.head_dim))
    block_r = max(1, 1024 // block_d)
    if rotation is None:
        out, cos, sin, positions, half, norms = q, slots, slots, slots, 0, None
    else:
        out = torch.empty((tokens, spec.heads, spec.head_dim), dtype=q.dtype, device=q.device)
        cos, sin, positions, half = rotation.cos, rotation.sin, rotation.positions, rotation.cos.shape[1]
        norms = None if rotation.q_norm is None or rotation.k_norm is None else (rotation.q_norm, rotation.k_norm)
    q_programs = 0 if rotation is None else triton.cdiv(tokens * spec.heads, block_r)
    write_kernel[(q_programs + triton.cdiv(tokens * spec.kv_heads, block_r),)](
        q, k, v, out, kv,
        kv.view(torch.float32) if spec.quantized else kv,
        slots, positions, cos, sin,
        norms[0].weight if norms else q, norms[1].weight if norms else q,
        norms[0].eps if norms else 0.0, norms[1].eps if norms else 0.0,
        tokens, q_programs, q.stride(0), k.stride(0), v.stride(0), kv.stride(0), layer * kv.stride(1),
        layout.head, layout.value, layout.key_scales, layout.value_scales,
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, D=spec.head_dim, BLOCK_D=block_d, BLOCK_R=block_r,
        BLOCK_SIZE=spec.block_size, HALF=half, NORM=norms is not None, VALUES=not spec.latent,
        CODED=CODES[spec.kv_cache_dtype], KIND=TYPES[spec.dtype], num_warps=4,
    )  # fmt: skip
    return out
