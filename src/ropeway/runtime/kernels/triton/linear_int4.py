"""y = x W^T with x in 16 or 32 bits and W in 4, widened in registers on its way to the tensor cores.

Packed weights are (K / 64, N, 32) bytes, K rounded up. Byte j of a block of 64 inputs has input j in its lower half and
input 32 + j in its upper half, so that both halves of a tile are tiles themselves, of 32 inputs that share a scale, and
nothing must be shuffled. A tile is one stretch of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.kernels.triton.linear_parts import cut, join

BLOCK = 64
_HALF = tl.constexpr(BLOCK // 2)


def pack(values: Tensor) -> Tensor:
    """(K / 64, N, 32) uint8 of `values` (N, K) uint8 within 0..15."""
    columns, depth = values.shape
    blocks = torch.nn.functional.pad(values, (0, -depth % BLOCK)).view(columns, -1, 2, BLOCK // 2)
    return (blocks[:, :, 0] | (blocks[:, :, 1] << 4)).transpose(0, 1).contiguous()


def unpack(packed: Tensor, depth: int) -> Tensor:
    """The inverse of `pack`: (N, depth) uint8."""
    halves = torch.cat([packed & 15, packed >> 4], dim=2)
    return halves.transpose(0, 1).reshape(packed.shape[1], -1)[:, :depth]


def by_group(stored: Tensor, depth: int, group: int) -> Tensor:
    """Scales or zero points (N, K / group) as the kernel reads them: (groups, N), with those of the inputs that `pack`
    has added, which are 0."""
    groups = -(-(depth + -depth % BLOCK) // group)
    return torch.nn.functional.pad(stored, (0, groups - stored.shape[1])).T.contiguous()


def multiply(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """(R, N) of x's dtype. `x` (R, K); `packed` as `pack` makes it; `scales` float16 and `zeros` uint8 as `by_group`
    does, None for 8 throughout; `group` is a multiple of 32."""
    rows, depth = x.shape
    blocks, columns, _ = packed.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    plan = cut(rows, columns, depth, x.device)
    into = out
    if plan.parts > 1:
        into = torch.empty((plan.parts, rows, columns), dtype=torch.float32, device=x.device)
    _multiply[(triton.cdiv(rows, plan.rows) * triton.cdiv(columns, plan.columns), plan.parts)](
        x, packed, into, scales, zeros, bias, rows, columns, depth, x.stride(0), blocks,
        triton.cdiv(blocks, plan.parts),
        GROUP=group, ZEROS=zeros is not None, BIASED=bias is not None, WHOLE=plan.parts == 1,
        ROWS=plan.rows, COLUMNS=plan.columns, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out if plan.parts == 1 else join(into, out, None, None, bias)


@triton.jit
def _widen(nibbles, group, column, there, scales, zeros, columns, DTYPE_OF, ZEROS: tl.constexpr):
    """`nibbles` (32, N) as the numbers they stand for, in the type of `DTYPE_OF`."""
    place = group.to(tl.int64) * columns + column
    scale = tl.load(scales + place, mask=there, other=0.0).to(tl.float32)[None, :]
    steps = nibbles.to(tl.float32)
    if ZEROS:
        steps -= tl.load(zeros + place, mask=there, other=0).to(tl.float32)[None, :]
    else:
        steps -= 8.0
    return (steps * scale).to(DTYPE_OF.dtype)


@triton.jit
def _multiply(
    x, packed, out, scales, zeros, bias, rows, columns, depth, step, blocks, share,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the result, or of the part of it that `share` blocks of inputs make."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    # Neighbouring programs share their columns, so that the weight is read once.
    tall = tl.cdiv(rows, ROWS)
    row = (tile % tall) * ROWS + tl.arange(0, ROWS)
    column = (tile // tall) * COLUMNS + tl.arange(0, COLUMNS)
    row_at = row.to(tl.int64)
    half = tl.arange(0, _HALF)
    real, there = row < rows, column < columns
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in range(part * share, tl.minimum(part * share + share, blocks)):
        first = block * 2 * _HALF
        at = first + half
        source = x + row_at[:, None] * step + at[None, :]
        low = tl.load(source, mask=real[:, None] & (at < depth)[None, :], other=0.0)
        high = tl.load(source + _HALF, mask=real[:, None] & (at + _HALF < depth)[None, :], other=0.0)
        stretch = (tl.cast(block, tl.int64) * columns + column[None, :]) * _HALF + half[:, None]
        both = tl.load(packed + stretch, mask=there[None, :], other=0)
        lower = _widen(both & 15, first // GROUP, column, there, scales, zeros, columns, low, ZEROS)
        upper = _widen(both >> 4, (first + _HALF) // GROUP, column, there, scales, zeros, columns, low, ZEROS)
        total = tl.dot(low, lower, total, input_precision="ieee")
        total = tl.dot(high, upper, total, input_precision="ieee")
    place = row_at[:, None] * columns + column[None, :]
    mask = real[:, None] & there[None, :]
    if WHOLE:
        if BIASED:
            total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + part.to(tl.int64) * rows * columns + place, total, mask=mask)
