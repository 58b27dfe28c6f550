"""The suites of attention, operations and whole engines once more, on a GPU. Without one they are skipped.

ROPEWAY_TEST_DEVICE=cpu runs them on the CPU and the kernels in Triton's interpreter: slow, but it shows whether the
tests themselves work. Kernels have their tests in tests/gpu_kernels, which run on the GPU too where there is one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = os.environ.get("ROPEWAY_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
if DEVICE != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Its tests are run again from here, by the names of their modules.
sys.path.insert(0, str(HERE.parent / "equality"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not DEVICE:
                item.add_marker(missing)


@pytest.fixture(scope="session")
def device() -> str:
    """'cuda', or what ROPEWAY_TEST_DEVICE says."""
    return DEVICE
