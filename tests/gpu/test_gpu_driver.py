"""What the driver says of the GPU that an engine runs on."""

from __future__ import annotations

import pytest
import torch

from ropeway.observe.gpu import Nvml
from ropeway.runtime.local import device_id


def test_the_driver_knows_the_gpu_by_the_name_that_the_engine_gives(device: str) -> None:
    if device != "cuda":
        pytest.skip("a CPU has no driver to ask")
    reading = Nvml().read(device_id(torch.device("cuda", torch.cuda.current_device())))
    assert reading is not None
    total = torch.cuda.get_device_properties(0).total_memory
    assert reading.memory_bytes is None or reading.memory_bytes >= total
    assert reading.utilization is None or 0 <= reading.utilization <= 1
