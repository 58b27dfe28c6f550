"""Products with quantized weights in plain torch, and with oneDNN: what serves where the native kernels do not.

Activations are quantized on the way in, as the native kernels do it: symmetric int8, one scale for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ropeway.runtime.layers.quantized import QuantizedWeight

SMALLEST = 2.0**-126
FP8_MOST = 448.0
_COLUMNS = 1024
"""Columns of a weight that are widened at a time, so that no call needs the whole of it in float32."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (T, K) as whole numbers within [-127, 127] in float32, and scales (T, 1) float32.

    Rounds to nearest even. A row that is all but zero has scale 0; one with a NaN or an infinity has scale NaN.
    """
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True) / 127 if wide.shape[1] else wide.new_zeros(wide.shape[0], 1)
    finite = scale.isfinite()
    usable = finite & (scale >= SMALLEST)
    values = torch.where(usable, wide / torch.where(usable, scale, 1.0), 0.0).round_()
    return values, torch.where(usable, scale, torch.where(finite, 0.0, torch.nan))


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (T, K), finite, in float8_e4m3fn, and scales (T, 1) float32: the largest magnitude of a row is 448."""
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / FP8_MOST).clamp_(min=SMALLEST)
    return (wide / scale).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), scale


class Stored:
    """What products with a quantized weight share: the weight as it was stored, and reading its rows."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self._stored = weight
        self._dtype = dtype

    def rows(self, ids: Tensor) -> Tensor:
        return self._stored.part(ids).dequantize().to(self._dtype)


class TorchIntProduct(Stored):
    """Plain torch: exact about what is computed, and slow, since the weight is widened at every call.

    On a GPU, and by weights in fp8, the activations stay as they are.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        parts = [slice(c, c + _COLUMNS) for c in range(0, self._stored.values.shape[0], _COLUMNS)]
        if x.device.type != "cpu" or self._stored.format == "fp8":
            y = torch.cat([functional.linear(x, self._stored.part(c).dequantize().to(x.dtype)) for c in parts], 1)
            return y if self._bias is None else y + self._bias
        values, scales = quantize_rows(x)
        y = torch.cat([_multiply(values, self._stored.part(c)) for c in parts], 1) * scales
        return (y if self._bias is None else y + self._bias.float()).to(self._dtype)


def _multiply(values: Tensor, weight: QuantizedWeight) -> Tensor:
    """`values` (T, K) times the weight, (T, N). int8 meets its scales last, so that up to 1,040 products are exact."""
    if weight.format == "int8":
        return functional.linear(values, weight.values.float()) * weight.scales
    return functional.linear(values, weight.dequantize())


class OneDnnInt8Product(Stored):
    """oneDNN's product of bytes, through operations that torch keeps private: hence the probe at start.

    It takes unsigned activations, so they are shifted by 128. Without VNNI its sums of two products may saturate.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._zeros = torch.zeros(weight.values.shape[0], dtype=torch.int64)
        self._bias = None if bias is None else bias.float()
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        values, scales = quantize_rows(x)
        y: Tensor = self._multiply(
            (values + 128).to(torch.uint8),
            1.0,
            128,
            self._packed,
            self._stored.scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        y = y * scales
        return (y if self._bias is None else y + self._bias).to(self._dtype)
