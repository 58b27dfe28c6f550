"""y = x W^T where both are bytes: int8, or e4m3 floats of 8 bits, with activations quantized row by row on the way in.

Scales come last where a weight has one for each output. Where it has one for each `group` inputs too (DeepSeek-V3's
checkpoints), so have the activations, and every block of inputs is scaled before it is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.kernels.triton.linear_parts import cut, join
from ropeway.runtime.layers.integer import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_DEPTH = 128


def quantize(x: Tensor, dtype: torch.dtype, group: int = 0) -> tuple[Tensor, Tensor]:
    """`x` (R, K) in `dtype`, int8 or float8_e4m3fn, and scales (R,), or (R, ceil(K / group)), float32.

    Rounds to nearest even. What is all but zero has scale 0, what has a NaN or an infinity scale NaN.
    """
    rows, depth = x.shape
    span = group or depth
    groups = triton.cdiv(depth, span)
    values = torch.empty((rows, depth), dtype=dtype, device=x.device)
    scales = torch.empty((rows, groups) if group else (rows,), dtype=torch.float32, device=x.device)
    if rows:
        width = triton.next_power_of_2(span)
        many = min(triton.next_power_of_2(groups), max(1, 4096 // width))
        _quantize[(rows, triton.cdiv(groups, many))](
            x, values, scales, depth, groups, x.stride(0), span,
            INTEGER=dtype == torch.int8, GROUPS=many, WIDTH=width, num_warps=min(max(many * width // 512, 1), 16),
        )  # fmt: skip
    return values, scales


def multiply(
    x: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype, group: int
) -> Tensor:
    """(R, N) of `dtype`: `x` (R, K) with `row_scales` times `weight` (N, K) with `scales`, (N,), or
    (N, ceil(K / group)) where `group`, a multiple of 32, is not 0."""
    rows, depth = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    if not rows:
        return out
    integer = x.dtype == torch.int8
    plan = cut(rows, columns, depth, x.device)
    block = min(group, _DEPTH) if group else _DEPTH
    into = out
    if plan.parts > 1:
        kind = torch.int32 if integer else torch.float32
        into = torch.empty((plan.parts, rows, columns), dtype=kind, device=x.device)
    _multiply[(triton.cdiv(rows, plan.rows) * triton.cdiv(columns, plan.columns), plan.parts)](
        x, weight, into, row_scales, scales, bias, rows, columns, depth, triton.cdiv(depth, group or depth),
        triton.cdiv(triton.cdiv(depth, block), plan.parts) * block,
        INTEGER=integer, GROUP=group, BIASED=bias is not None, WHOLE=plan.parts == 1,
        ROWS=plan.rows, COLUMNS=plan.columns, DEPTH=block, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if plan.parts == 1:
        return out
    if group:
        return join(into, out, None, None, bias)
    return join(into, out, row_scales, scales, bias)


@triton.jit
def _nearest_e4m3(x):
    """Numbers within [-448, 448], rounded to what e4m3 can hold: 3 bits behind the point, or multiples of 2^-9. So the
    cast that follows is exact, whoever makes it."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def _quantize(
    x, values, scales, depth, groups, step, span, INTEGER: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """`GROUPS` groups of a row, each of `span` inputs."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, WIDTH)
    at = group[:, None] * span + place[None, :]
    inside = (place[None, :] < span) & (at < depth)
    wide = tl.load(x + row * step + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.where(wide == wide, tl.abs(wide), float("inf")), axis=1)
    if INTEGER:
        scale = tl.div_rn(most, 127.0)
    else:
        scale = tl.div_rn(most, 448.0)
    finite = most < float("inf")
    usable = finite & (scale >= _SMALLEST)
    steps = tl.where(usable[:, None], tl.div_rn(wide, tl.where(usable, scale, 1.0)[:, None]), 0.0)
    if INTEGER:
        steps = (steps + 12582912.0) - 12582912.0  # to the nearest whole number
    else:
        steps = _nearest_e4m3(steps)
    tl.store(values + row * depth + at, steps.to(values.dtype.element_ty), mask=inside)
    kept = tl.where(usable, scale, tl.where(finite, 0.0, float("nan")))
    tl.store(scales + row * groups + group, kept, mask=group < groups)


@triton.jit
def _multiply(
    x, weight, out, row_scales, scales, bias, rows, columns, depth, groups, share,
    INTEGER: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the result, or of the part of it that `share` inputs make."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    # Neighbouring programs share their columns, so that the larger matrix, the weight, is read once.
    tall = tl.cdiv(rows, ROWS)
    row = (tile % tall) * ROWS + tl.arange(0, ROWS)
    column = (tile // tall) * COLUMNS + tl.arange(0, COLUMNS)
    row_at = row.to(tl.int64)
    column_at = column.to(tl.int64)
    real, there = row < rows, column < columns
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, depth), DEPTH):
        at = start + tl.arange(0, DEPTH)
        a = tl.load(x + row_at[:, None] * depth + at[None, :], mask=real[:, None] & (at < depth)[None, :], other=0.0)
        b = tl.load(
            weight + column_at[None, :] * depth + at[:, None], mask=there[None, :] & (at < depth)[:, None], other=0.0
        )
        if INTEGER:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        elif GROUP == 0:
            total = tl.dot(a, b, total, max_num_imprecise_acc=DEPTH)
        else:
            group = start // GROUP
            of_rows = tl.load(row_scales + row_at * groups + group, mask=real, other=0.0)
            of_columns = tl.load(scales + column_at * groups + group, mask=there, other=0.0)
            total += tl.dot(a, b) * (of_rows[:, None] * of_columns[None, :])
    place = row_at[:, None] * columns + column[None, :]
    mask = real[:, None] & there[None, :]
    if WHOLE:
        result = total.to(tl.float32)
        if GROUP == 0:
            of_rows = tl.load(row_scales + row_at, mask=real, other=0.0)
            of_columns = tl.load(scales + column_at, mask=there, other=0.0)
            result *= of_rows[:, None] * of_columns[None, :]
        if BIASED:
            result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + part.to(tl.int64) * rows * columns + place, total, mask=mask)
