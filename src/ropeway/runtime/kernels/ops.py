"""The small operations between the matrix products, behind one seam: plain torch, or fused native kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """Fused element-wise operations on float32 or bfloat16 rows.

    Arithmetic is float32 inside; results are rounded where Hugging Face models round them, so that both
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

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` (N, V) float32 contiguous. Returns ids (N,) int64, ties to the lowest id, and finite (N,) bool,
        False where a row holds NaN or +inf or nothing but -inf (its id is then meaningless). -inf alone is a mask."""


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

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = logits.max(dim=-1)
        # max propagates NaN. On ties torch names the first on the CPU; on CUDA that is not promised, so ask for it.
        if logits.device.type != "cpu":
            ids = (logits == best[:, None]).int().argmax(dim=-1)
        return ids, torch.isfinite(best)


def select_ops(device: torch.device, dtype: torch.dtype) -> tuple[Ops, list[str]]:
    """The operations to use on `device` for `dtype`, and one sentence for each implementation that was passed over."""
    return TorchOps(), []
