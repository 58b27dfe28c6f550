"""Kernels for GPUs, run by Triton's interpreter on the CPU. Where there is no Triton nothing is collected."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at its first import whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)
