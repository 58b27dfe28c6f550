"""Compile what a back end would launch, for a GPU that is not there.

The interpreter accepts much that the compiler does not. Launches are recorded with their arguments, on tensors of the
device "meta", and the same specialisations are compiled down to machine code; `ptxas` comes with Triton. This must run
in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas")


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """The compiled kernel, with `metadata.shared` in bytes. Raises whatever the compiler raises."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for number, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = "*" + NAMES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
            if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        assert all(0 < n < (2**31 if axis == 0 else 65536) for axis, n in enumerate(grid)), f"grid {grid}"

        def launch(*positional: Any, **named: Any) -> None:
            options = {key: named.pop(key) for key in OPTIONS if key in named}
            names = [parameter.name for parameter in self.kernel.params]
            arguments = {**dict(zip(names, positional, strict=False)), **named}
            assert set(arguments) == set(names), set(arguments) ^ set(names)
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


@contextmanager
def recorded(*kernels: tuple[Any, str]) -> Iterator[list[Launch]]:
    """The launches of `kernels`, each named by its module and its name there, which do not happen meanwhile."""
    launches: list[Launch] = []
    originals = [(module, name, getattr(module, name)) for module, name in kernels]
    for module, name, kernel in originals:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""


class Key:
    """A launch, equal to others that compile to the same code."""

    def __init__(self, of: Launch) -> None:
        self.of = of
        fixed = {p.name: of.arguments[p.name] for p in of.kernel.params if p.is_constexpr}
        self.key = (of.kernel.fn.__name__, str(sorted(fixed.items(), key=str)), str(of.options))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def report(case: str, capability: int, launches: Iterable[Launch]) -> None:
    """Compile each of `launches` once for that capability, and print what it takes as a line of JSON."""
    for launch in dict.fromkeys(map(Key, launches)):
        made = launch.of.compile(capability)
        print(json.dumps({
            "case": case, "capability": capability, "kernel": launch.of.kernel.fn.__name__,
            "shared": made.metadata.shared, "limit": SHARED[capability], "tensor_cores": "mma" in made.asm["ptx"],
            "options": launch.of.options,
        }), flush=True)  # fmt: skip
