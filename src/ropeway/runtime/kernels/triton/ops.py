"""The small operations between the matrix products as Triton kernels: see `ropeway.runtime.kernels.ops.Ops`.

Arithmetic is float32, and results are rounded where `TorchOps` rounds them. A row is one program, so that it never
depends on its neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.kernels.ops import TorchOps

_WIDEST = 1 << 15
"""Elements of a row up to which one program holds it in registers."""
_PART = 1024
_HEADS = 4
"""Heads that one program of `rotary` turns."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonOps:
    """The operations as fused kernels on a GPU. A call that they cannot take (another type or layout) goes to torch, so
    that both implementations accept the same arguments."""

    name = "triton"

    def __init__(self) -> None:
        self._torch = TorchOps()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _fits(x, weight) or not 1 <= x.dim() <= 3 or x.stride(-1) != 1:
            return self._torch.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        *lead, dim = x.shape
        *steps, _ = x.stride()
        outer, inner = (lead[0] if lead else 1), (lead[1] if len(lead) > 1 else 1)
        outer_step, inner_step = (steps[0] if steps else 0), (steps[1] if len(steps) > 1 else 0)
        if out.numel():
            block = triton.next_power_of_2(dim)
            _rms_norm[(outer * inner,)](
                x, weight, out, inner, outer_step, inner_step, dim, eps, BLOCK=block, num_warps=_warps(block)
            )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _fits(x, weight) or residual.dtype != x.dtype or not (x.is_contiguous() and residual.is_contiguous()):
            return self._torch.add_rms_norm(x, residual, weight, eps)
        rows, dim = x.shape
        out = torch.empty_like(x)
        if rows:
            block = triton.next_power_of_2(dim)
            _add_rms_norm[(rows,)](x, residual, weight, out, dim, eps, BLOCK=block, num_warps=_warps(block))
        return out

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        plain = all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (q, k))
        tables = cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        if not plain or not tables or q.dtype != k.dtype or q.dtype not in _TYPES:
            self._torch.rotary(q, k, cos, sin, positions)
            return
        tokens, heads, dim = q.shape
        kv_heads, half = k.shape[1], cos.shape[1]
        if tokens:
            _rotary[(tokens, triton.cdiv(heads, _HEADS) + triton.cdiv(kv_heads, _HEADS))](
                q, k, cos, sin, positions, heads, kv_heads, dim, half, q.stride(0), k.stride(0),
                HEADS=_HEADS, HALF=triton.next_power_of_2(half), num_warps=1 if half <= 32 else 2,
            )  # fmt: skip

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype not in _TYPES or not gate_up.is_contiguous():
            return self._torch.silu_mul(gate_up)
        rows, twice = gate_up.shape
        out = torch.empty((rows, twice // 2), dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            _silu_mul[(rows, triton.cdiv(twice // 2, _PART))](gate_up, out, twice // 2, BLOCK=_PART, num_warps=4)
        return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in _TYPES and weight.dtype == x.dtype and weight.is_contiguous() and x.shape[-1] <= _WIDEST


def _warps(block: int) -> int:
    """Eight elements for each thread, so that all loads of a row are under way at once."""
    return min(max(block // 256, 1), 16)


@triton.jit
def _normed(x, weight, dim, eps):
    """`x` by its root mean square, rounded, then by `weight`."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / dim + eps)
    return ((wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _rms_norm(x, weight, out, inner, outer_step, inner_step, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    source = x + (row // inner) * outer_step + (row % inner) * inner_step
    values = tl.load(source + at, mask=inside, other=0.0)
    weights = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row * dim + at, _normed(values, weights, dim, eps), mask=inside)


@triton.jit
def _add_rms_norm(x, residual, weight, out, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    values = tl.load(x + row * dim + at, mask=inside, other=0.0)
    before = tl.load(residual + row * dim + at, mask=inside, other=0.0)
    weights = tl.load(weight + at, mask=inside, other=0.0)
    total = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
    tl.store(residual + row * dim + at, total, mask=inside)
    tl.store(out + row * dim + at, _normed(total, weights, dim, eps), mask=inside)


@triton.jit
def _turn(x, first, heads, dim, half, c, s, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate `HEADS` heads of one token, from head `first`, by the angles whose cosines and sines are `c` and `s`."""
    head = first + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    lower = x + head * dim + at
    low = tl.load(lower, mask=inside, other=0.0)
    high = tl.load(lower + half, mask=inside, other=0.0)
    low_wide, high_wide = low.to(tl.float32), high.to(tl.float32)
    tl.store(lower, (low_wide * c - high_wide * s).to(low.dtype), mask=inside)
    tl.store(lower + half, (high_wide * c + low_wide * s).to(low.dtype), mask=inside)


@triton.jit
def _rotary(
    q, k, cos, sin, positions, heads, kv_heads, dim, half, q_step, k_step, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """Programs of the second axis take the heads of q, then those of k."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    of_q = tl.cdiv(heads, HEADS)
    at = tl.arange(0, HALF)
    table = tl.load(positions + token) * half + at
    c = tl.load(cos + table, mask=at < half, other=0.0)[None, :]
    s = tl.load(sin + table, mask=at < half, other=0.0)[None, :]
    if part < of_q:
        _turn(q + token * q_step, part * HEADS, heads, dim, half, c, s, HEADS, HALF)
    else:
        _turn(k + token * k_step, (part - of_q) * HEADS, kv_heads, dim, half, c, s, HEADS, HALF)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * width + at, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)
