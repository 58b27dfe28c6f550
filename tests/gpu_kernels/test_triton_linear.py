"""Products with quantized weights by Triton's kernels, against float64 on the very numbers that they multiply.

x is not bfloat16 here: Triton's interpreter multiplies its bits as if they were integers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ropeway.runtime.kernels.triton import linear_bytes, linear_int4, linear_parts
from ropeway.runtime.layers.gpu import Bytes, Nibbles
from ropeway.runtime.layers.integer import quantize_fp8, quantize_rows
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.weights.quant import quantize_fp8 as fp8_weight

FLOATS = (torch.float32, torch.float16)


def draw(kind: str, columns: int, depth: int) -> QuantizedWeight:
    format, *rest = kind.split()
    group = int(rest[0]) if rest else 0
    if format == "int8":
        values = torch.randint(-127, 128, (columns, depth)).to(torch.int8)
        values[0], values[-1] = 127, -127
        return QuantizedWeight("int8", values, torch.rand(columns) / 64)
    groups = -(-depth // group) if group else 0
    if format == "fp8":
        weight = fp8_weight(torch.randn(columns, depth))
        return (
            QuantizedWeight("fp8", weight.values, torch.rand(columns, groups) + 0.5, group=group) if group else weight
        )
    values = torch.randint(0, 16, (columns, depth)).to(torch.uint8)
    values[0], values[-1] = 15, 0
    zeros = torch.randint(0, 16, (columns, groups)).to(torch.uint8) if "zeros" in kind else None
    return QuantizedWeight("int4", values, (torch.rand(columns, groups) / 8).half().float(), zeros, group)


def product(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Bytes | Nibbles:
    return (Nibbles if weight.format == "int4" else Bytes)(weight, bias, dtype)


def taken(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """`x` in float64 as it is multiplied."""
    if weight.format == "int4":
        return x.double()
    span = weight.group or x.shape[1]
    parts = [quantize_rows(p) if weight.format == "int8" else quantize_fp8(p) for p in x.split(span, dim=1)]
    return torch.cat([values.double() * scales.double() for values, scales in parts], dim=1)


def assert_product(actual: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    seen, exact = taken(x, weight), weight.dequantize().double()
    expected, size = seen @ exact.T, seen.abs() @ exact.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    # int4 weights are rounded to x's type; tensor cores add fp8 in fewer bits than a float32 has.
    unit = 2.0**-10 if weight.format == "int4" and x.dtype != torch.float32 else 1e-6
    if weight.format == "fp8" and x.device.type == "cuda":
        unit = 2.0**-11
    allowed = unit * size + (2.0**-10 if actual.dtype == torch.float16 else 2.0**-22) * expected.abs()
    excess = ((actual.double() - expected).abs() - allowed).max()
    assert excess <= 0, f"{excess:.2e} beyond what rounding explains"


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize("depth", [5, 96, 1000])
def test_rows_are_quantized_like_on_the_cpu(depth: int, dtype: torch.dtype) -> None:
    x = (torch.randn(7, depth) * 10.0 ** torch.arange(-3, 4)[:, None]).to(dtype)
    x[2] = 0.0
    values, scales = linear_bytes.quantize(x, torch.int8)
    expected, expected_scales = quantize_rows(x)
    assert torch.equal(values.float(), expected)
    assert torch.equal(scales, expected_scales[:, 0])
    values, scales = linear_bytes.quantize(x, torch.float8_e4m3fn)
    expected, expected_scales = quantize_fp8(x)
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scales[[0, 1, 3, 4, 5, 6]], expected_scales[[0, 1, 3, 4, 5, 6], 0])
    assert scales[2] == 0


def test_every_fp8_is_reached() -> None:
    """All finite ones come back as they are, and what lies between two goes to the nearer, or the even one."""
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    between = torch.cat([every, (every[1:] + every[:-1]) / 2, every[1:] * 0.3 + every[:-1] * 0.7])
    values, scales = linear_bytes.quantize(between[None], torch.float8_e4m3fn)
    assert scales.item() == 1
    assert torch.equal(values[0].float(), between.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_groups_have_scales_of_their_own(dtype: torch.dtype) -> None:
    x = torch.randn(3, 80) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(32)[:80]
    x[1, 40], x[2, 70] = math.nan, math.inf
    values, scales = linear_bytes.quantize(x, dtype, 32)
    for group in range(3):
        part = slice(32 * group, 32 * group + 32)
        alone, alone_scales = linear_bytes.quantize(x[:, part].contiguous(), dtype)
        assert torch.equal(values[:, part].float(), alone.float())
        assert torch.equal(scales[:, group].nan_to_num(-1), alone_scales.nan_to_num(-1))
    assert scales.isnan().tolist() == [[False] * 3, [False, True, False], [False, False, True]]


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (18, torch.float32), (66, torch.float16)])
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 32", "fp8 128", "int4 32", "int4 64 zeros", "int4 32 zeros"])
def test_product(kind: str, rows: int, dtype: torch.dtype) -> None:
    columns, depth = 72, (96 if "64" not in kind else 128)
    weight = draw(kind, columns, depth)
    bias = torch.randn(columns).to(dtype) if rows == 18 else None
    x = (torch.randn(rows, depth) * 3).to(dtype)
    assert_product(product(weight, bias, dtype)(x), x, weight, bias)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 128", "int4 128 zeros"])
def test_few_columns_and_many_inputs_are_divided(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_parts, "processors", lambda _: 3)
    weight = draw(kind, 20, 2176)
    plan = linear_parts.cut(rows, 20, 2176, weight.values.device)
    assert (plan.rows, plan.parts) == ((16, 4) if rows == 3 else (64, 2))
    bias = torch.randn(20)
    x = torch.randn(rows, 2176)
    assert_product(product(weight, bias, torch.float32)(x), x, weight, bias)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    for kind in ("int8", "fp8", "int4 32"):
        weight = draw(kind, 24, 64)
        compute = product(weight, None, torch.float32)
        x = torch.randn(9, 64)
        x[4] = math.nan
        found = compute(x)
        assert found[4].isnan().all()
        assert torch.equal(found[5:6], compute(x[5:6]))


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 32", "int4 32", "int4 32 zeros"])
def test_rows_of_the_weight(kind: str) -> None:
    weight = draw(kind, 30, 96)
    ids = torch.tensor([29, 0, 7, 7])
    assert torch.equal(product(weight, None, torch.float32).rows(ids), weight.dequantize()[ids])


@pytest.mark.parametrize("depth", [32, 64, 96])
def test_packing(depth: int) -> None:
    values = torch.randint(0, 16, (5, depth)).to(torch.uint8)
    packed = linear_int4.pack(values)
    assert packed.shape == (-(-depth // 64), 5, 32)
    assert torch.equal(linear_int4.unpack(packed, depth), values)


def test_no_rows() -> None:
    for kind in ("int8", "fp8 32", "int4 32"):
        assert product(draw(kind, 20, 64), None, torch.float32)(torch.empty(0, 64)).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 128", "int4 64 zeros"])
def test_a_device_gets_these(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU")
    weight = draw(kind, 4096, 2048)
    layer = PackedLinear(weight, None, device, dtype=dtype)
    assert isinstance(layer._product, Bytes | Nibbles)
    for rows in (1, 17, 300):
        x = torch.randn(rows, 2048).to(dtype)
        found, expected = layer(x).double(), taken(x, weight) @ weight.dequantize().double().T
        assert float((found - expected).norm() / expected.norm()) < 5e-3
