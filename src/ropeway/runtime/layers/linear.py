"""Linear layers behind one seam: each weight is kept once, packed for the fastest correct product of this machine."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ropeway.errors import KernelError
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels.library import LinearWeight, NativeLibrary, load
from ropeway.runtime.layers import gpu
from ropeway.runtime.layers.integer import OneDnnInt8Product, TorchIntProduct, quantize_fp8, quantize_rows
from ropeway.runtime.layers.quantized import QuantizedWeight, checked

FASTEST = 3
DEEPEST = 1 << 16
"""Input features up to which sums of quantized products surely fit 32 bits."""
CLEARLY = 1.25
"""A preferred product is passed over only if another is this many times faster, so that noise at start-up does not
decide which of two good ones serves, and with it the last bits of every answer."""


Scheme = Literal["plain", "int8", "int4", "fp8", "other"]
"""How a weight is stored: in x's type, in one of the quantized forms, or in one for which there is no kernel."""


class Product(Protocol):
    """y = x W^T + b for one packed weight."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the plain weight: `ids` (T,) int64 to (T, in_features)."""


class TorchProduct:
    """`torch.nn.functional.linear` on the plain weight, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._weight)


class OneDnnProduct:
    """oneDNN with its own packing, through operations that torch keeps private: hence the probe at start."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiply(x, self._packed, self._bias, "none", [], "")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._packed.to_dense())


class NativeProduct:
    """Ropeway's own kernels on the CPU, where `dtype` is that of x and y: plain weights of the same type (see
    kernels/cpu/linear.cpp), or int8 and int4 with activations quantized for each row (kernels/cpu/linear_int.cpp).

    `weight` describes the packed weight to C++ code, which may use it for as long as this product lives.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._library = library
        self._bias = None if bias is None else bias.contiguous()
        scales = zeros = None
        if isinstance(weight, QuantizedWeight):
            values, scales, zeros = weight.values.contiguous(), weight.scales.contiguous(), weight.zeros
            if weight.format == "int4":
                scales = scales.half()
                zeros = None if zeros is None else zeros.contiguous()
            kind, group = (1 if weight.format == "int8" else 2 if zeros is None else 3), weight.group
        else:
            values, kind, group, dtype = weight.contiguous(), 0, 0, weight.dtype
        assert dtype is not None, "a quantized weight does not know x's type"
        self._dtype = dtype
        self._columns, self._depth = values.shape
        form = LinearWeight(_TYPES[dtype], kind, self._columns, self._depth, group)
        self._packed = library.weights.take(library.packed_bytes(ctypes.byref(form)))
        library.pack(
            ctypes.byref(form), *map(_address, (values, scales, zeros)), self._packed.data_ptr(), library.refresh()
        )
        form.packed, form.bias = self._packed.data_ptr(), _address(self._bias)
        self.weight = form
        self._reference = ctypes.byref(form)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        count = x.shape[0]
        y = torch.empty((count, self._columns), dtype=self._dtype)
        if self._library.linear(self._reference, x.data_ptr(), y.data_ptr(), count, self._library.threads):
            raise KernelError(f"A linear layer of {count} rows ran out of memory. Lower --max-num-batched-tokens.")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        count = ids.shape[0]
        out = torch.empty((count, self._depth), dtype=self._dtype)
        self._library.unpack(self._reference, ids.data_ptr(), out.data_ptr(), count, self._library.threads)
        return out


class ReorderedProduct:
    """`product`, whose weight has its input features in another order: column j belongs to feature order[j] of x."""

    def __init__(self, product: Product, order: Tensor) -> None:
        self._product, self._order = product, order

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.index_select(1, self._order))

    def rows(self, ids: Tensor) -> Tensor:
        found = self._product.rows(ids)
        return torch.empty_like(found).index_copy_(1, self._order, found)


_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_CPU = torch.device("cpu")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class PackedLinear:
    """y = x W^T + b, with W kept in one packed copy.

    `weight` is (out_features, in_features). After construction the caller should drop its own reference to `weight`;
    an embedding that shares it reads it back with `rows`.
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        lookup: bool = False,
        level: int = FASTEST,
    ) -> None:
        """`dtype` is that of x and y; a plain weight has it already, and a quantized one is for bfloat16 unless told.
        `lookup` promises that `rows` is quick, for a weight that is an embedding too. `level`: see `choose`.

        Raises ModelError if the groups of a quantized weight do not fit it.
        """
        if isinstance(weight, QuantizedWeight):
            weight = checked(weight)
            values, scheme = weight.values, _scheme(weight)
            dtype = dtype or torch.bfloat16
        else:
            values, scheme = weight, "plain"
            dtype = dtype or weight.dtype
            weight = weight.to(dtype)
        device = values.device if device is None else device
        self.out_features, self.in_features = values.shape
        choice = choose(device.type, dtype, scheme, level)
        make = choice.make_for_lookup if lookup else choice.make
        self._product = make(weight.to(device), None if bias is None else bias.to(device=device, dtype=dtype))
        if isinstance(weight, QuantizedWeight) and weight.order is not None:
            self._product = ReorderedProduct(self._product, weight.order.to(device))

    @property
    def native(self) -> LinearWeight | None:
        """The packed weight for C++ code, which may use it for as long as this layer lives; None if the native
        kernels do not serve."""
        return self._product.weight if isinstance(self._product, NativeProduct) else None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (T, in_features) of the layer's dtype. Returns (T, out_features), contiguous."""
        return self._product(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight in the layer's dtype: `ids` (T,) int64, within [0, out_features), to a new
        (T, in_features)."""
        return self._product.rows(ids)


def _scheme(weight: QuantizedWeight) -> Scheme:
    """int4 in groups that no kernel knows is a scheme of its own, which plain torch computes."""
    if weight.format != "int4":
        return weight.format if weight.values.shape[1] <= DEEPEST else "other"
    return "int4" if weight.group % 32 == 0 and weight.values.shape[1] <= DEEPEST else "other"


Weight = Tensor | QuantizedWeight
Make = Callable[[Any, Tensor | None], Product]


@dataclass(frozen=True)
class Choice:
    """How linear layers of one kind are computed on one device. `make_for_lookup` is for weights read by row too."""

    name: str
    make: Make
    make_for_lookup: Make
    reasons: tuple[str, ...]


def describe_linear(device: torch.device, dtype: torch.dtype, scheme: Scheme = "plain", level: int = FASTEST) -> str:
    """One sentence for the start-up banner: how such linear layers are computed on `device`, and why."""
    choice = choose(device.type, dtype, scheme, level)
    why = f" ({'; '.join(choice.reasons)})" if choice.reasons else ""
    kind = "" if scheme == "plain" else f"{scheme} with "
    return f"linear layers: {choice.name}, {kind}{str(dtype).removeprefix('torch.')}{why}"


@functools.cache
def choose(device_type: str, dtype: torch.dtype, scheme: Scheme = "plain", level: int = FASTEST) -> Choice:
    """Probe the ways to multiply by a weight: wrong ones are dropped, and the preferred one is kept unless it is
    clearly slower than another. Takes about a tenth of a second, once.

    `level` says what may be used: 0 plain torch alone, 1 oneDNN too, 2 and above the native kernels too. On a GPU
    nothing is timed, and everything is used from 1 on.
    """
    plain: Make = TorchProduct if scheme == "plain" else functools.partial(TorchIntProduct, dtype=dtype)
    if device_type != "cpu":
        return _choose_beyond(torch.device(device_type), dtype, scheme, level, plain)
    candidates: dict[str, Make] = {}
    reasons: list[str] = []
    for name, make in {**_preferences(dtype, scheme, level, reasons), "torch": plain}.items():
        fault = _fault(make, dtype, scheme)
        if fault is None:
            candidates[name] = make
        else:
            reasons.append(f"{name}: {fault}")
    # Plain torch widens a quantized weight at every call: no need to time that.
    rivals = [name for name in candidates if scheme == "plain" or name != "torch"] or ["torch"]
    seconds = {name: _seconds(candidates[name], dtype, scheme) for name in rivals} if len(rivals) > 1 else {}
    name = _pick(rivals, seconds, reasons)
    lookup = candidates[name] if name != "oneDNN" or scheme != "plain" else candidates.get("native", plain)
    return Choice(name, candidates[name], lookup, tuple(reasons))


def _choose_beyond(device: torch.device, dtype: torch.dtype, scheme: Scheme, level: int, plain: Make) -> Choice:
    """On another device than the CPU: the first of the preferred ways that is right there."""
    reasons: list[str] = []
    ways = gpu.preferences(dtype, scheme, reasons) if level >= 1 else {}
    for name, make in ways.items():
        with _CPU:  # where the probe's numbers are drawn, whatever the default device is
            fault = _fault(make, dtype, scheme, device)
        if fault is None:
            return Choice(name, make, make, tuple(reasons))
        reasons.append(f"{name}: {fault}")
    return Choice("torch", plain, plain, tuple(reasons))


def _preferences(dtype: torch.dtype, scheme: Scheme, level: int, reasons: list[str]) -> dict[str, Make]:
    """What can be tried beside plain torch, the preferred first. oneDNN leads where it knows instructions that the
    native kernels do not use (AMX)."""
    found: dict[str, Make] = {}
    if dtype not in _TYPES or scheme in ("fp8", "other"):
        return found
    cpu = cpu_info.detect()
    if level >= 2:
        library = load()
        if isinstance(library, str):
            reasons.append(f"native: {library}")
        else:
            found["native"] = functools.partial(NativeProduct, library, dtype=dtype)
    if level >= 1 and scheme == "int8":
        onednn: dict[str, Make] = {"oneDNN": functools.partial(OneDnnInt8Product, dtype=dtype)}
    elif level >= 1 and scheme == "plain" and (dtype == torch.float32 or cpu.native_bf16):
        onednn = {"oneDNN": OneDnnProduct}
    else:
        onednn = {}
    tiles = "amx_int8" if scheme == "int8" else "amx_bf16"
    return {**onednn, **found} if tiles in cpu.flags and dtype == torch.bfloat16 else {**found, **onednn}


def _fault(make: Make, dtype: torch.dtype, scheme: Scheme = "plain", device: torch.device = _CPU) -> str | None:
    """Compare with float64 on shapes that fill no vector evenly. None, or what is wrong."""
    draw = torch.Generator().manual_seed(0)
    weight = _sample(48 if scheme == "fp8" else 50, 96, dtype, scheme, draw)
    exact = weight.dequantize().double() if isinstance(weight, QuantizedWeight) else weight.double()
    bias = torch.randn(len(exact), generator=draw).to(dtype)
    # Tensor cores add fp8 in fewer bits than a float32 has.
    allowed = 1e-5 if dtype == torch.float32 and scheme != "fp8" else 2e-2
    try:
        product = make(weight.to(device), bias.to(device))
        for count in (1, 7, 33, 130):
            x = torch.randn(count, 96, generator=draw).to(dtype)
            x[0] = 3.0  # with weights at the end of their range too: bytes must not saturate
            expected = _taken(x, scheme, device) @ exact.T + bias.double()
            error = float((product(x.to(device)).cpu().double() - expected).abs().max() / expected.abs().max())
            if not error <= allowed:
                return f"its result is wrong by {error:.1e}"
    except Exception as error:  # compilers of kernels raise what they like
        return f"it does not work here ({(str(error) or type(error).__name__).splitlines()[0][:80]})"
    return None


def _taken(x: Tensor, scheme: Scheme, device: torch.device) -> Tensor:
    """`x` as a product with weights of `scheme` takes it, in float64."""
    if scheme in ({"plain", "fp8"} if device.type == "cpu" else {"plain", "int4"}):
        return x.double()
    values, scales = quantize_fp8(x) if scheme == "fp8" else quantize_rows(x)
    return values.double() * scales.double()


def _sample(columns: int, depth: int, dtype: torch.dtype, scheme: Scheme, draw: torch.Generator) -> Weight:
    """A weight of the kind that is chosen for. The first column is at the end of its range."""
    if scheme == "plain":
        return torch.randn(columns, depth, generator=draw).to(dtype)
    if scheme == "fp8":
        values, scales = quantize_fp8(torch.randn(columns, depth, generator=draw))
        return QuantizedWeight("fp8", values, scales[:, 0])
    if scheme == "int8":
        values = torch.randint(-127, 128, (columns, depth), generator=draw, dtype=torch.int8)
        values[0] = 127
        return QuantizedWeight("int8", values, torch.rand(columns, generator=draw) / 127)
    group = 32 if scheme == "int4" else 16
    values = torch.randint(0, 16, (columns, depth), generator=draw, dtype=torch.uint8)
    values[0] = 15
    shape = (columns, depth // group)
    scales = (torch.rand(shape, generator=draw) / 8).half().float()
    return QuantizedWeight(
        "int4", values, scales, torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8), group
    )


def _seconds(make: Make, dtype: torch.dtype, scheme: Scheme) -> float:
    """Time of a decode step's and a prefill chunk's product together, each the best of three."""
    product = make(_sample(2048, 1024, dtype, scheme, torch.Generator().manual_seed(0)), None)
    total = 0.0
    for count, weight in ((1, 8.0), (16, 4.0), (256, 1.0)):
        x = torch.ones(count, 1024, dtype=dtype)
        product(x)
        best = min(_timed(product, x) for _ in range(3))
        total += weight * best
    return total


def _timed(product: Product, x: Tensor) -> float:
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start


def _pick(names: list[str], seconds: dict[str, float], reasons: list[str]) -> str:
    chosen = names[0]
    for name in names[1:]:
        if seconds[name] * CLEARLY < seconds[chosen]:
            reasons.append(f"{chosen}: {seconds[chosen] / seconds[name]:.1f} times slower than {name} here")
            chosen = name
    return chosen
