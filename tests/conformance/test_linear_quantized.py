"""Linear layers with quantized weights: exact integers on every instruction set, and one meaning everywhere."""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from native import library_of
from ropeway.errors import ModelError
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.kernels.library import NativeLibrary
from ropeway.runtime.layers import linear
from ropeway.runtime.layers.integer import OneDnnInt8Product, TorchIntProduct, quantize_rows
from ropeway.runtime.layers.linear import NativeProduct, PackedLinear
from ropeway.runtime.layers.quantized import QuantizedWeight

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16)
KINDS = ("int8", "int4", "int4 with zeros")
ROWS = (1, 2, 3, 5, 6, 7, 11, 13, 16, 96, 97, 130)


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return library_of(request.param)


def draw(kind: str, columns: int, depth: int, group: int = 32) -> QuantizedWeight:
    """A weight of all possible values, some of its first columns at one end of the range."""
    if kind == "int8":
        values = torch.randint(-127, 128, (columns, depth), dtype=torch.int8)
        values[0], values[-1] = 127, -127
        return QuantizedWeight("int8", values, torch.rand(columns) / 64)
    values = torch.randint(0, 16, (columns, depth), dtype=torch.uint8)
    values[0], values[-1] = 15, 0
    shape = (columns, depth // group)
    zeros = torch.randint(0, 16, shape, dtype=torch.uint8) if "zeros" in kind else None
    return QuantizedWeight("int4", values, (torch.rand(shape) / 8).half().float(), zeros, group)


def activations(rows: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Rows of many magnitudes; the first are at one end of the range, or there in turn."""
    x = torch.randn(rows, depth) * 10.0 ** torch.randint(-6, 7, (rows, 1))
    x[0] = 2.5
    x[1:2] = -3.0
    x[2:3] = torch.tensor([1.0, -1.0]).repeat(depth)[:depth]
    x[3:4] = 0.0
    return x.to(dtype)


def assert_product(actual: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, unit: float = 4e-7) -> None:
    """What is left beside exact integers is rounding of float32 scales and sums, and of the result to its type."""
    values, scales = quantize_rows(x)
    expected = values.double() @ weight.dequantize().double().T * scales.double()
    size = values.double().abs() @ weight.dequantize().double().abs().T * scales.double()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    allowed = unit * size + (2.0**-8 if actual.dtype == torch.bfloat16 else 2.0**-23) * expected.abs()
    assert actual.is_contiguous()
    excess = ((actual.double() - expected).abs() - allowed).max()
    assert excess <= 0, f"{excess:.2e} beyond what rounding explains"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "columns", "depth", "group"),
    [
        ("int8", 64, 64, 0),
        ("int8", 1, 8, 0),
        ("int8", 50, 33, 0),
        ("int8", 81, 321, 0),
        ("int4", 64, 64, 32),
        ("int4", 1, 32, 32),
        ("int4 with zeros", 50, 96, 32),
        ("int4 with zeros", 81, 384, 128),
        ("int4", 33, 192, 192),
    ],
)
def test_product(
    library: NativeLibrary, kind: str, columns: int, depth: int, group: int, bias: bool, dtype: torch.dtype
) -> None:
    weight = draw(kind, columns, depth, group)
    added = torch.randn(columns).to(dtype) if bias else None
    product = NativeProduct(library, weight, added, dtype)
    for rows in (0, *ROWS):
        x = activations(max(rows, 1), depth, dtype)[:rows]
        y = product(x)
        assert y.dtype == dtype
        if rows:
            assert_product(y, x, weight, added)
            assert torch.equal(
                y[3:4], (torch.zeros(1, columns) if added is None else added[None])[: rows - 3].to(dtype)
            )
    ids = torch.randint(0, columns, (9,))
    assert torch.equal(product.rows(ids), weight.dequantize()[ids].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_instruction_sets_give_the_same_bits(library: NativeLibrary, kind: str, dtype: torch.dtype) -> None:
    weight, x = draw(kind, 75, 256), activations(29, 256, dtype)
    bias = torch.randn(75).to(dtype)
    generic = NativeProduct(library_of("generic"), weight, bias, dtype)(x)
    assert torch.equal(NativeProduct(library, weight, bias, dtype)(x), generic)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(library: NativeLibrary, kind: str) -> None:
    product = NativeProduct(library, draw(kind, 112, 512, 64), None, torch.float32)
    x = torch.randn(203, 512)
    together = product(x)
    for begin, end in ((0, 1), (202, 203), (5, 7), (4, 7), (90, 103), (3, 8), (7, 16), (0, 100)):
        assert torch.equal(product(x[begin:end]), together[begin:end])


def test_the_longest_sums_are_exact(library: NativeLibrary) -> None:
    """Everything at the end of its range, over the greatest depth: 2^16 products of 127 * 127."""
    depth = linear.DEEPEST
    values = torch.full((3, depth), 127, dtype=torch.int8)
    values[1], values[2] = -127, -128
    product = NativeProduct(library, QuantizedWeight("int8", values, torch.ones(3)), None, torch.float32)
    y = product(torch.tensor([[127.0], [-127.0]]).expand(2, depth))
    sums = [Fraction(127 * sign * value * depth) for sign in (1, -1) for value in (127, -127, -128)]
    assert [Fraction(v) for v in y.flatten().tolist()] == [Fraction(torch.tensor(int(s)).float().item()) for s in sums]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_that_is_not_finite_is_nan_alone(library: NativeLibrary, kind: str, dtype: torch.dtype) -> None:
    weight = draw(kind, 40, 64)
    x = torch.randn(9, 64).to(dtype)
    clean = NativeProduct(library, weight, None, dtype)(x)
    x[1, 3], x[4, 63], x[7, 0] = torch.nan, torch.inf, -torch.inf
    for product in (NativeProduct(library, weight, None, dtype), TorchIntProduct(weight, None, dtype)):
        y = product(x)
        bad = torch.tensor([1, 4, 7])
        assert y[bad].isnan().all()
        good = torch.tensor([0, 2, 3, 5, 6, 8])
        torch.testing.assert_close(y[good], clean[good])


def test_tiny_rows_count_as_zero_and_huge_ones_do_not(library: NativeLibrary) -> None:
    weight = draw("int8", 20, 64)
    product = NativeProduct(library, weight, None, torch.float32)
    x = torch.randn(3, 64)
    x /= x.abs().amax(1, keepdim=True)
    x *= torch.tensor([[126.0 * 2.0**-126], [128.0 * 2.0**-126], [1e36]])
    y = product(x)
    assert torch.equal(y[0], torch.zeros(20))
    assert (y[1] != 0).any()
    assert_product(y[2:], x[2:], weight, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_level_means_the_same(kind: str, level: int, dtype: torch.dtype) -> None:
    weight, bias = draw(kind, 50, 96), torch.randn(50)
    layer = PackedLinear(weight, bias, CPU, dtype=dtype, lookup=True, level=level)
    assert (layer.out_features, layer.in_features) == (50, 96)
    x = activations(17, 96, dtype)
    assert_product(layer(x), x, weight, bias.to(dtype), unit=2e-6)  # torch sums in float32
    ids = torch.tensor([49, 0])
    assert torch.equal(layer.rows(ids), weight.dequantize()[ids].to(dtype))


def test_levels_choose_what_they_name() -> None:
    assert linear.choose("cpu", torch.float32, "int8", 0).name == "torch"
    assert linear.choose("cpu", torch.float32, "int8", 1).name in {"torch", "oneDNN"}
    assert linear.choose("cpu", torch.float32, "plain", 0).name == "torch"
    assert linear.choose("cpu", torch.float32, "plain", 1).name in {"torch", "oneDNN"}
    sentence = linear.describe_linear(CPU, torch.bfloat16, "int4", 3)
    assert "int4 with bfloat16" in sentence
    assert linear.choose("cpu", torch.bfloat16, "int4", 3).name in sentence


def test_onednn_serves_with_vnni_and_elsewhere_only_if_it_is_right() -> None:
    fault = linear._fault(functools.partial(OneDnnInt8Product, dtype=torch.float32), torch.float32, "int8")
    if any("vnni" in flag or "amx_int8" in flag for flag in cpu_info.detect().flags):
        assert fault is None
    else:
        assert fault is None or "wrong" in fault


@pytest.mark.parametrize("group", [16, 48])
def test_groups_without_a_kernel_are_served_by_torch(group: int) -> None:
    weight = draw("int4 with zeros", 24, 96, group)
    layer = PackedLinear(weight, None, CPU, dtype=torch.float32)
    x = torch.randn(5, 96)
    assert_product(layer(x), x, weight, None, unit=2e-6)


def test_misfits_are_refused() -> None:
    good = draw("int4 with zeros", 8, 96, 32)
    for bad, word in (
        (QuantizedWeight("int4", good.values, good.scales, None, 64), "groups of 64 .* divides 96"),
        (QuantizedWeight("int4", good.values, good.scales, None, 0), "groups of 0"),
        (QuantizedWeight("int4", good.values, good.scales[:, :2], None, 32), r"scales of shape \(8, 2\), not \(8, 3\)"),
        (QuantizedWeight("int4", good.values, good.scales, good.zeros[:7], 32), "zero points of shape"),  # type: ignore[index]
        (QuantizedWeight("int4", good.values, good.scales * 1e9, None, 32), "not finite in float16"),
        (QuantizedWeight("int8", good.values.to(torch.int8), torch.full((8,), torch.nan)), "not finite"),
    ):
        with pytest.raises(ModelError, match=word):
            PackedLinear(bad, None, CPU, dtype=torch.float32)
