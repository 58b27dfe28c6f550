"""Linear layers behind one seam: each weight is kept once, packed for the fastest correct product of this machine."""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ropeway.errors import KernelError
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels.library import LinearWeight, NativeLibrary, load

HUGE_PAGE = 2 << 20
CLEARLY = 1.5
"""A preferred product is passed over only if another is this many times faster, so that noise at start-up does not
decide which of two good ones serves, and with it the last bits of every answer."""


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
    """Ropeway's own kernel (see kernels/cpu/linear.cpp): float32, or bfloat16 summed in float32 on any processor.

    `weight` describes the packed weight to C++ code, which may use it for as long as this product lives.
    """

    def __init__(self, library: NativeLibrary, weight: Tensor, bias: Tensor | None) -> None:
        self._library = library
        self._dtype = weight.dtype
        columns, depth = weight.shape
        form = LinearWeight(type={torch.float32: 0, torch.bfloat16: 1}[weight.dtype], columns=columns, depth=depth)
        self._packed = _huge_pages(library.packed_bytes(ctypes.byref(form)))
        plain = weight.contiguous()
        library.pack(ctypes.byref(form), plain.data_ptr(), self._packed.data_ptr(), library.refresh())
        self._bias = None if bias is None else bias.contiguous()
        form.packed = self._packed.data_ptr()
        form.bias = None if self._bias is None else self._bias.data_ptr()
        self.weight = form
        self._reference = ctypes.byref(form)
        self._columns, self._depth = columns, depth

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


class PackedLinear:
    """y = x W^T + b, with W kept in one packed copy.

    `weight` is (out_features, in_features). After construction the caller should drop its own reference to `weight`;
    an embedding that shares it reads it back with `rows`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, device: torch.device | None = None, *, lookup: bool = False
    ) -> None:
        """`lookup` promises that `rows` is quick, for a weight that is an embedding too."""
        device = weight.device if device is None else device
        self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        choice = choose(device.type, weight.dtype)
        make = choice.make_for_lookup if lookup else choice.make
        self._product = make(weight.to(device), None if bias is None else bias.to(device=device, dtype=weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (T, in_features), of the weight's dtype. Returns (T, out_features), contiguous."""
        return self._product(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the plain weight: `ids` (T,) int64, within [0, out_features), to a new (T, in_features)."""
        return self._product.rows(ids)


Make = Callable[[Tensor, Tensor | None], Product]


@dataclass(frozen=True)
class Choice:
    """How linear layers of one type are computed on one device. `make_for_lookup` is for weights read by row too."""

    name: str
    make: Make
    make_for_lookup: Make
    reasons: tuple[str, ...]


def describe_linear(device: torch.device, dtype: torch.dtype) -> str:
    """One sentence for the start-up banner: how linear layers of `dtype` are computed on `device`, and why."""
    choice = choose(device.type, dtype)
    why = f" ({'; '.join(choice.reasons)})" if choice.reasons else ""
    return f"linear layers: {choice.name}, {str(dtype).removeprefix('torch.')}{why}"


@functools.cache
def choose(device_type: str, dtype: torch.dtype) -> Choice:
    """Probe the ways to multiply by a weight: wrong ones are dropped, and the preferred one is kept unless it is
    clearly slower than another. Takes about a tenth of a second, once."""
    if device_type != "cpu":
        return Choice("torch", TorchProduct, TorchProduct, ())
    candidates: dict[str, Make] = {}
    reasons: list[str] = []
    for name, make in _preferences(dtype, reasons).items():
        fault = _fault(make, dtype)
        if fault is None:
            candidates[name] = make
        else:
            reasons.append(f"{name}: {fault}")
    seconds = {name: _seconds(make, dtype) for name, make in candidates.items()} if len(candidates) > 1 else {}
    name = _pick(list(candidates), seconds, reasons)
    lookup = candidates[name] if name != "oneDNN" else candidates.get("native", TorchProduct)
    return Choice(name, candidates[name], lookup, tuple(reasons))


def _preferences(dtype: torch.dtype, reasons: list[str]) -> dict[str, Make]:
    """What can be tried, the preferred first. oneDNN leads where the processor multiplies bfloat16 itself: it knows
    instructions that the native kernels do not use (AMX)."""
    found: dict[str, Make] = {}
    if dtype in (torch.float32, torch.bfloat16):
        library = load()
        if isinstance(library, str):
            reasons.append(f"native: {library}")
        else:
            found["native"] = functools.partial(NativeProduct, library)
        if dtype == torch.float32:
            found["oneDNN"] = OneDnnProduct
        elif cpu_info.detect().native_bf16:
            found = {"oneDNN": OneDnnProduct, **found}
    found["torch"] = TorchProduct
    return found


def _fault(make: Make, dtype: torch.dtype) -> str | None:
    """Compare with float64 on a shape that fills no vector evenly. None, or what is wrong."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 72, generator=draw).to(dtype)
    bias = torch.randn(50, generator=draw).to(dtype)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        product = make(weight, bias)
        for count in (1, 7, 33):
            x = torch.randn(count, 72, generator=draw).to(dtype)
            expected = x.double() @ weight.double().T + bias.double()
            error = float((product(x).double() - expected).abs().max() / expected.abs().max())
            if not error <= allowed:
                return f"its result is wrong by {error:.1e}"
    except (RuntimeError, AttributeError, NotImplementedError, KernelError) as error:
        return f"it does not work here ({str(error).splitlines()[0][:80]})"
    return None


def _seconds(make: Make, dtype: torch.dtype) -> float:
    """Time of a decode step's and a prefill chunk's product together, each the best of three."""
    product = make(torch.ones(2048, 1024, dtype=dtype), None)
    total = 0.0
    for count, weight in ((1, 8.0), (8, 4.0), (64, 1.0)):
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


def _huge_pages(size: int) -> Tensor:
    """`size` bytes for a packed weight. Large ones ask for huge pages: reading them is a fifth to a quarter faster
    where the kernel grants them, since a stream over 4 KiB pages waits for address translation."""
    if size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)
