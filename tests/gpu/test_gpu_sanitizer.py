"""The kernels under NVIDIA's compute-sanitizer, where it is installed: no access outside of what they were given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUND = 86
"""The exit status that we ask for if an error is found."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernels", ["attention", "latent", "ops", "sample", "linear", "moe"])
def test_no_kernel_reads_or_writes_beyond_its_tensors(kernels: str, device: str) -> None:
    program = shutil.which("compute-sanitizer")
    tests = sorted((ROOT / "tests/gpu_kernels").glob(f"test_triton_{kernels}*.py"))
    assert tests, f"there are no tests of {kernels} kernels"
    if program is None or device != "cuda":
        pytest.skip("needs a CUDA device and compute-sanitizer")
    # Each tensor in an allocation of its own: within torch's pools an access beyond one would be another's memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = [program, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--target-processes", "all"]
    suite = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(
        [*words, *suite], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    said = (done.stdout + done.stderr)[-4000:]
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device or system")
    assert done.returncode != FOUND, said
    assert done.returncode == 0, said
