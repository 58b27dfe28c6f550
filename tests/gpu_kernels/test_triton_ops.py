"""The small operations as Triton kernels: the tests of tests/conformance/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from conformance.test_ops import *  # noqa: F403 - all tests that there are, also those to come
from conformance.test_ops import Ops
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.kernels.triton.ops import TritonOps


@pytest.fixture
def ops() -> Ops:
    return TritonOps()


def test_float16_is_rounded_where_torch_rounds() -> None:
    """Both sum and exponentiate in their own ways, so a result may fall to the other side, and seldom does."""
    x, residual, weight = torch.randn(3, 200).half(), torch.randn(3, 200).half(), torch.randn(200).half()
    ours, theirs = residual.clone(), residual.clone()
    found, expected = TritonOps().add_rms_norm(x, ours, weight, 1e-5), TorchOps().add_rms_norm(x, theirs, weight, 1e-5)
    assert torch.equal(ours, theirs)
    assert (found != expected).float().mean() < 0.02
    assert (TritonOps().silu_mul(x) != TorchOps().silu_mul(x)).float().mean() < 0.02


def test_what_the_kernels_cannot_take_goes_to_torch() -> None:
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(8)
    assert torch.equal(TritonOps().rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))
    assert torch.equal(TritonOps().rms_norm(x[0].half(), weight, 1e-5), TorchOps().rms_norm(x[0].half(), weight, 1e-5))
    turned = torch.randn(16, 5).T
    assert torch.equal(TritonOps().silu_mul(turned), TorchOps().silu_mul(turned))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    ops = TritonOps()
    x = torch.randn(rows, 32)
    assert ops.rms_norm(x, torch.ones(32), 1e-5).shape == (rows, 32)
    assert ops.add_rms_norm(x, x.clone(), torch.ones(32), 1e-5).shape == (rows, 32)
    assert ops.silu_mul(x).shape == (rows, 16)
    q, k = torch.randn(rows, 2, 8), torch.randn(rows, 1, 8)
    ops.rotary(q, k, torch.ones(4, 4), torch.zeros(4, 4), torch.zeros(rows, dtype=torch.int64))
