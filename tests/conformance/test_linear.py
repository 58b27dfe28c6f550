"""Linear layers: every way to compute them gives the same, and the choice falls on one that works."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from native import library_of
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.layers import linear
from ropeway.runtime.layers.linear import Make, NativeProduct, OneDnnProduct, PackedLinear, TorchProduct

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["torch", "oneDNN", *VARIANTS])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "torch":
        return TorchProduct
    if request.param == "oneDNN":
        return OneDnnProduct
    return functools.partial(NativeProduct, library_of(request.param))


def skip_if_unsupported(make: Make, dtype: torch.dtype) -> None:
    if make is OneDnnProduct and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")


def assert_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """float32: rounding of a sum of `depth` products. bfloat16: the result's own rounding on top (2^-8, twice)."""
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected = expected + bias.double()
    assert actual.dtype == weight.dtype
    assert actual.is_contiguous()
    unit = 2e-6 if actual.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(actual.double(), expected, rtol=unit, atol=3 * unit * weight.shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("columns", "depth"), [(64, 64), (1, 8), (50, 33), (17, 128), (960, 320)])
@pytest.mark.parametrize("bias", [False, True])
def test_product(make: Make, columns: int, depth: int, bias: bool, dtype: torch.dtype) -> None:
    skip_if_unsupported(make, dtype)
    weight = torch.randn(columns, depth).to(dtype)
    added = torch.randn(columns).to(dtype) if bias else None
    product = make(weight.clone(), added)
    for rows in (0, 1, 2, 3, 5, 6, 7, 9, 13, 96, 97, 200):
        x = torch.randn(rows, depth).to(dtype)
        assert_product(product(x), x, weight, added)
    ids = torch.randint(0, columns, (9,))
    assert torch.equal(product.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_its_neighbours(variant: str, dtype: torch.dtype) -> None:
    product = NativeProduct(library_of(variant), torch.randn(272, 500).to(dtype), None)
    x = torch.randn(203, 500).to(dtype)
    together = product(x)
    for begin, end in ((0, 1), (202, 203), (5, 7), (4, 7), (90, 103), (3, 8), (7, 16), (0, 100)):
        assert torch.equal(product(x[begin:end]), together[begin:end])


def test_rows_of_a_reordered_weight_are_those_of_the_plain_one(make: Make) -> None:
    weight, order, ids = torch.randn(40, 64), torch.randperm(64), torch.tensor([3, 39, 3])
    product = linear.ReorderedProduct(make(weight[:, order].contiguous(), None), order)
    assert torch.equal(product.rows(ids), weight[ids])
    x = torch.randn(5, 64)
    assert_product(product(x), x, weight, None)


def test_a_view_with_other_strides_is_taken(make: Make) -> None:
    weight = torch.randn(32, 64)
    x = torch.randn(5, 128)[:, 64:]
    assert_product(make(weight, None)(x), x, weight, None)


def test_large_weights_survive_their_source() -> None:
    weight = torch.randn(1100, 1024)
    layer = PackedLinear(weight.clone(), None, CPU)
    x = torch.randn(3, 1024)
    assert_product(layer(x), x, weight, None)
    assert (layer.out_features, layer.in_features) == (1100, 1024)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_choice_works_and_says_so(dtype: torch.dtype) -> None:
    choice = linear.choose("cpu", dtype, "plain", linear.FASTEST)  # as it was chosen: another look is another timing
    assert choice.name in linear.describe_linear(CPU, dtype)
    weight, x = torch.randn(48, 40).to(dtype), torch.randn(4, 40).to(dtype)
    layer = PackedLinear(weight, None, CPU, lookup=True)
    assert_product(layer(x), x, weight, None)
    ids = torch.tensor([47, 0])
    assert torch.equal(layer.rows(ids), weight[ids])


def test_wrong_and_slow_products_are_passed_over() -> None:
    class Wrong(TorchProduct):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + 1

    class Absent(TorchProduct):
        def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
            raise RuntimeError("no such operation\nsecond line")

    assert linear._fault(TorchProduct, torch.float32) is None
    assert "wrong" in (linear._fault(Wrong, torch.float32) or "")
    assert "no such operation" in (linear._fault(Absent, torch.float32) or "")
    reasons: list[str] = []
    assert linear._pick(["a", "b"], {"a": 1.2, "b": 1.0}, reasons) == "a"
    assert not reasons
    assert linear._pick(["a", "b"], {"a": 2.0, "b": 1.0}, reasons) == "b"
    assert "2.0 times slower" in reasons[0]
