"""What the matrix products share: how they are cut into programs, and putting together what a cut along the inputs has
left in parts."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 64
"""Rows up to which a product waits for the weights alone: then two programs for each processor read."""
_SHORTEST = 512
"""Inputs that a part has at least: shorter ones would cost more to put together than they gain."""
_BLOCK = 512


@dataclass(frozen=True)
class Cut:
    """A program computes `rows` x `columns` of the result, `parts` of them a share of the inputs each."""

    rows: int
    columns: int
    parts: int
    warps: int
    stages: int


def cut(rows: int, columns: int, depth: int, device: torch.device) -> Cut:
    """How a product is divided. From the shape alone, so that it may be captured in a graph, and nothing is timed.

    Tiles of 128 x 128 read little enough for each product, if there are enough of them for all processors. Else tiles
    are smaller, 16 rows being the least that tensor cores take, and the inputs are divided too.
    """
    whole = processors(device)
    if rows > _FEW and triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= whole:
        return Cut(128, 128, 1, 8, 3)
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    programs = triton.cdiv(rows, tall) * triton.cdiv(columns, 64)
    wanted = 2 * whole if rows <= _FEW else whole
    parts = 1
    while parts < 16 and programs * parts < wanted and depth >= 2 * parts * _SHORTEST:
        parts *= 2
    return Cut(tall, 64, parts, 4, 4)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; one where a kernel is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def join(
    parts: Tensor, out: Tensor, row_scales: Tensor | None, column_scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`out` (R, N): the sum of `parts` (P, R, N), float32 or int32, times `row_scales` (R,) and `column_scales` (N,),
    plus `bias` (N,)."""
    count, rows, columns = parts.shape
    _join[(rows, triton.cdiv(columns, _BLOCK))](
        parts, out, row_scales, column_scales, bias, rows, columns,
        PARTS=count, SCALED=row_scales is not None, BIASED=bias is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _join(
    parts, out, row_scales, column_scales, bias, rows, columns,
    PARTS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.load(parts + row * columns + at, mask=inside, other=0)
    for part in range(1, PARTS):
        total += tl.load(parts + (row + rows * part) * columns + at, mask=inside, other=0)
    result = total.to(tl.float32)
    if SCALED:
        result *= tl.load(row_scales + row) * tl.load(column_scales + at, mask=inside, other=0.0)
    if BIASED:
        result += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), mask=inside)
