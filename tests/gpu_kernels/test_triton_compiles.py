"""Kernels are compiled to machine code for a GPU that is not there: the interpreter accepts more than the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_kernels.machine_code import compiled


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_attention_compiles(tmp_path: Path) -> None:
    """One model for one GPU, as this takes long; compile_attention.py knows more of both."""
    found = compiled("compile_attention.py", "qwen-fp8", "90", folder=tmp_path, products={"attend"})
    assert found == {"qwen-fp8": {"attend", "combine", "write_kernel"}}
