"""The small operations between the matrix products, behind one seam: plain torch, or fused kernels."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ropeway.runtime.kernels.library import NativeLibrary, load


class Ops(Protocol):
    """Fused element-wise operations on float32, bfloat16 or float16 rows.

    Arithmetic is float32 inside; results are rounded where Hugging Face models round them, so that all
    implementations agree with them and with each other up to the last bit or two.
    """

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in a new tensor.

        `x` (..., D), any strides with the last dimension contiguous; `weight` (D,).
        """

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += x` in place, then `rms_norm(residual)`. Both (T, D) contiguous."""

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate `q` (T, heads, head_dim) and `k` (T, kv_heads, head_dim) in place (RoFormer, Su et al. 2021).

        Any token stride, last two dimensions contiguous. `cos` and `sin` are float32 tables (max_positions, n / 2) and
        `positions` (T,) int64 picks their rows. The first n <= head_dim dimensions rotate, dimension i with i + n / 2
        (the half-split form of Hugging Face); the others stay.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, where `gate_up` (T, 2 * I) holds gate in its first half. Returns (T, I), new."""


class TorchOps:
    """The operations in plain torch, on any device."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        c = cos[positions].unsqueeze(1)
        s = sin[positions].unsqueeze(1)
        half = cos.shape[1]
        for x in (q, k):
            low, high = x[..., :half].float(), x[..., half : 2 * half].float()
            first, second = low * c - high * s, high * c + low * s  # both, before x changes: in float32 low is a view
            x[..., :half], x[..., half : 2 * half] = first, second

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class NativeOps:
    """The operations as fused kernels on the CPU. A call that the kernels cannot take (another type or layout) goes to
    torch, so that both implementations accept the same arguments."""

    name = "native"

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._torch = TorchOps()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind = _TYPES.get(x.dtype)
        if kind is None or weight.dtype != x.dtype or not 1 <= x.dim() <= 3 or x.stride(-1) != 1:
            return self._torch.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        *lead, dim = x.shape
        *steps, _ = x.stride()
        outer, inner = (lead[0] if lead else 1), (lead[1] if len(lead) > 1 else 1)
        outer_step, inner_step = (steps[0] if steps else 0), (steps[1] if len(steps) > 1 else 0)
        library = self._library
        library.rms_norm(
            kind,
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            outer,
            inner,
            outer_step,
            inner_step,
            dim,
            eps,
            library.threads,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind = _TYPES.get(x.dtype)
        if kind is None or weight.dtype != x.dtype or not (x.is_contiguous() and residual.is_contiguous()):
            return self._torch.add_rms_norm(x, residual, weight, eps)
        rows, dim = x.shape
        out = torch.empty((rows, dim), dtype=x.dtype)
        self._library.add_rms_norm(
            kind,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            dim,
            eps,
            self._library.threads,
        )
        return out

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        kind = _TYPES.get(q.dtype)
        if kind is None or cos.dtype != torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
            self._torch.rotary(q, k, cos, sin, positions)
            return
        tokens, heads, dim = q.shape
        self._library.rotary(
            kind,
            q.data_ptr(),
            k.data_ptr(),
            None,
            None,
            0.0,
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            tokens,
            heads,
            k.shape[1],
            dim,
            cos.shape[1],
            q.stride(0),
            k.stride(0),
            self._library.threads,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        kind = _TYPES.get(gate_up.dtype)
        if kind is None or not gate_up.is_contiguous():
            return self._torch.silu_mul(gate_up)
        rows, twice = gate_up.shape
        out = torch.empty((rows, twice // 2), dtype=gate_up.dtype)
        self._library.silu_mul(kind, gate_up.data_ptr(), out.data_ptr(), rows, twice // 2, self._library.threads)
        return out


_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def select_ops(device: torch.device, dtype: torch.dtype, level: int = 3) -> tuple[Ops, list[str]]:
    """The operations to use on `device` for `dtype`, and one sentence for each implementation that was passed over.
    Below level 2 on a CPU, and 1 on a GPU, they are torch's."""
    if device.type != "cpu":
        return _select_beyond(device, level)
    if dtype not in _TYPES:
        return TorchOps(), [f"native: it computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"]
    if level < 2:
        return TorchOps(), [f"native: kernel level {level} does without"]
    library = load()
    if isinstance(library, str):
        return TorchOps(), [f"native: {library}"]
    return NativeOps(library), []


def _select_beyond(device: torch.device, level: int) -> tuple[Ops, list[str]]:
    """The same on another device than the CPU."""
    if device.type != "cuda":
        return TorchOps(), [f"triton: it runs on CUDA, not on {device.type}"]
    if level < 1:
        return TorchOps(), [f"triton: kernel level {level} does without"]
    if find_spec("triton") is None:
        return TorchOps(), ["triton: it is not installed"]
    from ropeway.runtime.kernels.triton.ops import TritonOps

    return TritonOps(), []
