"""Products with quantized weights on a GPU.

int8 and fp8 multiply bytes by bytes: activations are quantized for each row as it comes. int4 is widened in registers,
and activations stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ropeway.runtime.layers.integer import Stored
from ropeway.runtime.layers.quantized import QuantizedWeight

FP8 = (8, 9)
"""The compute capability from which tensor cores multiply e4m3."""
_FEW = 64
"""Rows up to which reading the weight is all that counts, which our kernel does with all processors."""

Make = Callable[[QuantizedWeight, Tensor | None], "Bytes | Nibbles"]


def lacks_fp8(device: torch.device) -> str:
    """Why `device` does not compute in fp8, '' if it does."""
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) < FP8:
        return f"{torch.cuda.get_device_name(device)} has no fp8 (compute capability 8.9 and later do)"
    return "" if find_spec("triton") else "it needs Triton, which is not installed"


def preferences(dtype: torch.dtype, scheme: str, reasons: list[str]) -> dict[str, Make]:
    """Ways to multiply by a weight of `scheme`, the preferred first; `reasons` gets why there are none."""
    if scheme not in ("int8", "int4", "fp8"):
        return {}
    if find_spec("triton") is None:
        reasons.append("triton: it is not installed")
        return {}
    if scheme == "int4":
        return {"triton": functools.partial(Nibbles, dtype=dtype)}
    found: dict[str, Make] = {"triton": functools.partial(Bytes, dtype=dtype)}
    if scheme == "fp8" and dtype == torch.bfloat16:
        return {"triton and cuBLAS": functools.partial(Bytes, dtype=dtype, library=True), **found}
    return found


class Bytes(Stored):
    """int8 or fp8. With `library` products of many rows go to torch's own, where scales are one for each output."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, *, library: bool = False
    ) -> None:
        from ropeway.runtime.kernels.triton import linear_bytes

        super().__init__(weight, dtype)
        self._bias, self._kernels = bias, linear_bytes
        columns, depth = weight.values.shape
        self._library = library and not weight.group and columns % 16 == 0 and depth % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._stored
        values, scales = self._kernels.quantize(x.contiguous(), weight.values.dtype, weight.group)
        if self._library and x.shape[0] > _FEW:
            y = torch._scaled_mm(
                values, weight.values.T, scale_a=scales[:, None], scale_b=weight.scales[None], out_dtype=self._dtype
            )
            return y if self._bias is None else y + self._bias
        return self._kernels.multiply(
            values, scales, weight.values, weight.scales, self._bias, self._dtype, weight.group
        )


class Nibbles:
    """int4 in groups of a multiple of 32 inputs."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        from ropeway.runtime.kernels.triton import linear_int4

        self._kernels, self._bias, self._dtype, self._group = linear_int4, bias, dtype, weight.group
        self._depth = weight.values.shape[1]
        self._packed = linear_int4.pack(weight.values)
        self._scales = linear_int4.by_group(weight.scales.half(), self._depth, weight.group)
        zeros = weight.zeros
        self._zeros = None if zeros is None else linear_int4.by_group(zeros, self._depth, weight.group)

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.multiply(x.contiguous(), self._packed, self._scales, self._zeros, self._bias, self._group)

    def rows(self, ids: Tensor) -> Tensor:
        groups = self._depth // self._group
        part = QuantizedWeight(
            "int4",
            self._kernels.unpack(self._packed[:, ids], self._depth),
            self._scales[:groups, ids].T.float(),
            None if self._zeros is None else self._zeros[:groups, ids].T,
            self._group,
        )
        return part.dequantize().to(self._dtype)
