"""Kernels for GPUs: on a machine with one they are compiled and run there, elsewhere Triton's interpreter runs them on
the CPU. Tests make tensors without naming a device: the default one is right. Without Triton nothing is collected."""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

CUDA = torch.cuda.is_available()
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def _seeded_on_the_device(device: torch.device) -> Iterator[None]:
    torch.manual_seed(1234)
    with device if CUDA else nullcontext():
        yield
