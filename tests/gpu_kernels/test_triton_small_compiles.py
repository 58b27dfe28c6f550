"""The small operations, the sampler and the quantized products become machine code for GPUs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_kernels.machine_code import compiled

OPERATIONS = {"_rms_norm", "_add_rms_norm", "_rotary", "_silu_mul"}
SAMPLER = {"_scan", "_pick", "_count", "_gather", "_select"}


@pytest.mark.parametrize(
    ("kernels", "capability"),
    [
        ({"small-qwen": OPERATIONS, "sample-small": SAMPLER, "int4": {"_multiply", "_join"}}, "80"),
        ({"fp8": {"_quantize", "_multiply", "_join"}}, "90"),
    ],
)
def test_kernels_compile(kernels: dict[str, set[str]], capability: str, tmp_path: Path) -> None:
    assert compiled("compile_small.py", *kernels, capability, folder=tmp_path, products={"_multiply"}) == kernels
