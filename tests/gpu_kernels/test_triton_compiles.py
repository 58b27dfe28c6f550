"""Kernels are compiled to machine code for a GPU that is not there: the interpreter accepts more than the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_attention_compiles(tmp_path: Path) -> None:
    """One model for one GPU, as this takes long; compile_attention.py knows more of both."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_attention.py"), "qwen-fp8", "90"], capture_output=True, text=True,
        env=environment, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"attend", "combine", "write_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["tensor_cores"] == (kernel["kernel"] == "attend"), kernel
