"""The fused operations: torch and native give the same, and what Hugging Face models compute."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch

from native import library_of
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.kernels.ops import NativeOps, Ops, TorchOps, select_ops

FLOATS = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["torch", *VARIANTS])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    return NativeOps(library_of(request.param))


def interpreted(ops: Ops, x: torch.Tensor) -> bool:
    """Triton's interpreter cuts a float32 off to a bfloat16, where devices round."""
    return ops.name == "triton" and x.device.type == "cpu" and x.dtype == torch.bfloat16


def close(ops: Ops, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 within about eight units in the last place, bfloat16 within two; what is near 0 by as much of 1."""
    unit = 2.0**-20 if actual.dtype == torch.float32 else 2.0**-6 if interpreted(ops, actual) else 2.0**-7
    torch.testing.assert_close(actual.double(), expected.double(), rtol=unit, atol=unit / 2)


def norm_like_transformers(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [8, 64, 100, 960, 1023])
def test_rms_norm(ops: Ops, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(7, dim).to(dtype)
    weight = torch.randn(dim).to(dtype)
    close(ops, ops.rms_norm(x, weight, 1e-5), norm_like_transformers(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_of_heads_in_a_fused_tensor(ops: Ops, dtype: torch.dtype) -> None:
    fused = torch.randn(5, 6 * 64).to(dtype)
    k = fused[:, 128:256].view(5, 2, 64)
    weight = torch.randn(64).to(dtype)
    before = fused.clone()
    close(ops, ops.rms_norm(k, weight, 1e-6), norm_like_transformers(k, weight, 1e-6))
    assert torch.equal(fused, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 80])
def test_add_rms_norm(ops: Ops, rows: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(rows, 968).to(dtype), torch.randn(rows, 968).to(dtype)
    weight = torch.randn(968).to(dtype)
    total = residual + x
    out = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(ops, residual, total)
    assert interpreted(ops, x) or torch.equal(residual, total)
    close(ops, out, norm_like_transformers(residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 80), (128, 32), (8, 8)])
def test_rotary(ops: Ops, dim: int, rotated: int, dtype: torch.dtype) -> None:
    heads, kv_heads, tokens = 5, 2, 9
    angles = torch.outer(torch.arange(50).float(), 10000.0 ** (-torch.arange(0, rotated, 2).float() / rotated))
    positions = torch.randint(0, 50, (tokens,))
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    before = fused.clone()
    q = fused[:, : heads * dim].view(tokens, heads, dim)
    k = fused[:, heads * dim : (heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    ops.rotary(q, k, angles.cos(), angles.sin(), positions)

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([-high, low], dim=-1)

    cos = torch.cat([angles.cos(), angles.cos()], -1)[positions][:, None].double()
    sin = torch.cat([angles.sin(), angles.sin()], -1)[positions][:, None].double()
    x = before.view(tokens, -1, dim).double()
    rotating = x[..., :rotated] * cos + rotate_half(x[..., :rotated]) * sin
    expected = torch.cat([rotating, x[..., rotated:]], -1)
    expected[:, heads + kv_heads :] = x[:, heads + kv_heads :]
    close(ops, fused.view(tokens, -1, dim), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (40, 2560)])
def test_silu_mul(ops: Ops, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * width) * 8).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0])
    gate, up = gate_up.chunk(2, dim=-1)
    close(ops, ops.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


def test_nan_is_not_hidden(ops: Ops) -> None:
    for dtype in FLOATS:
        x = torch.randn(2, 64).to(dtype)
        x[1, 40] = math.nan
        assert ops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)[1].isnan().all()
        out = ops.silu_mul(x)
        assert out[1, 8].isnan()
        assert out.isnan().sum() == 1


def test_a_row_does_not_depend_on_its_neighbours(ops: Ops) -> None:
    x = torch.randn(70, 1000)
    weight = torch.randn(1000)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5)[33:34], ops.rms_norm(x[33:34], weight, 1e-5))
    assert torch.equal(ops.silu_mul(x)[33:34], ops.silu_mul(x[33:34]))


def test_other_types_fall_back_to_torch() -> None:
    chosen, reasons = select_ops(torch.device("cpu"), torch.float16)
    assert isinstance(chosen, TorchOps)
    assert "float16" in reasons[0]
    chosen, _ = select_ops(torch.device("cpu"), torch.float32)
    x = torch.randn(3, 16).half()
    assert torch.equal(chosen.silu_mul(x), TorchOps().silu_mul(x))


def test_a_gpu_gets_its_own() -> None:
    device = torch.device("cuda")
    chosen, passed = select_ops(device, torch.bfloat16)
    assert (chosen.name, passed) == (
        ("triton", []) if find_spec("triton") else ("torch", ["triton: it is not installed"])
    )
    assert select_ops(device, torch.bfloat16, level=0)[1] == ["triton: kernel level 0 does without"]
