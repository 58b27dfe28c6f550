"""The small operations on a GPU, by Triton's kernels and by torch: the tests of tests/conformance/test_ops.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conformance.test_ops import *  # noqa: F403 - all tests that there are, also those to come
from ropeway.runtime.kernels.ops import Ops, TorchOps


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    torch.manual_seed(1234)
    with torch.device(device):
        yield


@pytest.fixture(params=["torch", "triton"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    pytest.importorskip("triton")
    from ropeway.runtime.kernels.triton.ops import TritonOps

    return TritonOps()
