"""Compile the small operations, the sampler and the products with quantized weights for a GPU that is not there; the
arguments are names of CASES and a compute capability. Prints as JSON what each kernel takes of shared memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from compiling import Launch, recorded, report
from torch import Tensor

from ropeway.runtime.kernels.triton import linear_bytes, linear_int4, linear_parts, ops, sample

META = torch.device("meta")
BFLOAT = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = BFLOAT) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def small(hidden: int, inner: int, heads: int, kv_heads: int, dim: int) -> None:
    kernels = ops.TritonOps()
    for rows in (1, 300):
        x = empty(rows, hidden)
        kernels.rms_norm(x, empty(hidden), 1e-5)
        kernels.add_rms_norm(x, empty(rows, hidden), empty(hidden), 1e-5)
        kernels.silu_mul(empty(rows, 2 * inner))
        fused = empty(rows, heads + 2 * kv_heads, dim)
        tables = empty(4096, dim // 2, dtype=torch.float32)
        kernels.rms_norm(fused[:, :heads], empty(dim), 1e-6)
        kernels.rotary(fused[:, :heads], fused[:, heads:-kv_heads], tables, tables, empty(rows, dtype=torch.int64))


def choice(vocab: int) -> None:
    for rows in (1, 64):
        wish = empty(rows, dtype=torch.float64)
        sample.sample(empty(rows, vocab, dtype=torch.float32), wish, empty(rows, dtype=torch.int64), wish, wish, wish)


def multiply_bytes(dtype: torch.dtype, group: int, biased: bool) -> None:
    for columns, depth in ((6144, 4096), (4096, 14336)):
        weight = empty(columns, depth, dtype=dtype)
        scales = (
            empty(columns, -(-depth // group), dtype=torch.float32) if group else empty(columns, dtype=torch.float32)
        )
        for rows in (1, 32, 64, 4096):
            x, row_scales = linear_bytes.quantize(empty(rows, depth), dtype, group)
            linear_bytes.multiply(x, row_scales, weight, scales, empty(columns) if biased else None, BFLOAT, group)


def multiply_int4(dtype: torch.dtype, group: int, zeros: bool) -> None:
    for columns, depth in ((6144, 4096), (4096, 14336)):
        packed = empty(depth // 64, columns, 32, dtype=torch.uint8)
        scales = empty(depth // group, columns, dtype=torch.float16)
        points = empty(depth // group, columns, dtype=torch.uint8) if zeros else None
        for rows in (1, 32, 64, 4096):
            linear_int4.multiply(empty(rows, depth, dtype=dtype), packed, scales, points, None, group)


CASES: dict[str, Callable[[], None]] = {
    "small-llama": lambda: small(4096, 14336, 32, 8, 128),
    "small-qwen": lambda: small(1000, 3072, 14, 2, 80),
    "sample-llama": lambda: choice(128256),
    "sample-small": lambda: choice(300),
    "int8": lambda: multiply_bytes(torch.int8, 0, True),
    "fp8": lambda: multiply_bytes(torch.float8_e4m3fn, 0, False),
    "fp8-blocks": lambda: multiply_bytes(torch.float8_e4m3fn, 128, False),
    "int4": lambda: multiply_int4(BFLOAT, 64, True),
    "int4-half": lambda: multiply_int4(torch.float16, 32, False),
}
KERNELS = (
    *((ops, name) for name in ("_rms_norm", "_add_rms_norm", "_rotary", "_silu_mul")),
    *((sample, name) for name in ("_scan", "_pick", "_count", "_gather", "_select")),
    *((linear_bytes, name) for name in ("_quantize", "_multiply")),
    (linear_int4, "_multiply"),
    (linear_parts, "_join"),
)


def launches(case: str) -> Iterator[Launch]:
    with recorded(*KERNELS) as found:
        CASES[case]()
    yield from found


def main() -> None:
    linear_parts.processors = lambda _: 132
    *cases, capability = sys.argv[1:]
    for case in cases:
        report(case, int(capability), launches(case))


if __name__ == "__main__":
    main()
