"""GPU metrics over a stand-in for the driver's library: what it says is shown, what it does not say is not."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from msgspec.structs import replace

from ropeway.contract import ExecutorInfo, Ready
from ropeway.observe.gpu import Nvml, Reading
from ropeway.observe.metrics import Metrics

INFO = ExecutorInfo(
    model="m", device="cuda", dtype="bfloat16", num_blocks=100, block_size=16, max_slots=8, max_model_len=64,
    vocab_size=9, device_id="GPU-1",
)  # fmt: skip


class Library:
    """Answers as NVML does: through pointers, with 0 or the number of an error. It refuses the calls in `mute`."""

    def __init__(self, *mute: str, init: int = 0) -> None:
        self.mute = mute
        self.init = init
        self.opened = 0

    def _answer(self, name: str) -> int:
        return 3 if name in self.mute else 0  # NVML_ERROR_NOT_SUPPORTED

    def nvmlInit_v2(self) -> int:
        self.opened += 1
        return self.init

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 77
        return 0 if uuid == b"GPU-1" else 6  # NVML_ERROR_NOT_FOUND

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, rates: Any) -> int:
        assert handle.value == 77
        numbers = ctypes.cast(rates, ctypes.POINTER(ctypes.c_uint))
        numbers[0], numbers[1] = 85, 12
        return self._answer("rates")

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        numbers = ctypes.cast(memory, ctypes.POINTER(ctypes.c_ulonglong))
        numbers[0], numbers[1], numbers[2] = 140 << 30, 40 << 30, 100 << 30
        return self._answer("memory")

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, milliwatts: Any) -> int:
        ctypes.cast(milliwatts, ctypes.POINTER(ctypes.c_uint))[0] = 412_500
        return self._answer("power")


def shown(info: ExecutorInfo, nvml: Nvml) -> dict[str, float]:
    metrics = Metrics("m", gpus=nvml)
    metrics.on_report(Ready(info))
    samples = [sample for family in metrics.families() for sample in family.samples]
    found = {one.name: (one.value, one.labels) for one in samples if one.name.startswith("ropeway_gpu_")}
    assert all(labels == {"model_name": "m", "engine": "0", "gpu": "GPU-1"} for _, labels in found.values())
    return {name.removeprefix("ropeway_gpu_"): value for name, (value, _) in found.items()}


def test_what_the_driver_says_is_shown() -> None:
    library = Library()
    nvml = Nvml(lambda: library)
    for _ in range(2):
        assert shown(INFO, nvml) == {
            "utilization": 0.85, "memory_bytes": 140 << 30, "memory_used_bytes": 100 << 30, "power_watts": 412.5,
        }  # fmt: skip
    assert library.opened == 1


@pytest.mark.parametrize(
    ("mute", "left"),
    [
        (("rates",), Reading(None, 140 << 30, 100 << 30, 412.5)),
        (("memory", "power"), Reading(0.85)),
        (("rates", "memory", "power"), Reading()),
    ],
)
def test_what_it_does_not_say_is_left_out(mute: tuple[str, ...], left: Reading) -> None:
    nvml = Nvml(lambda: Library(*mute))
    assert nvml.read("GPU-1") == left
    assert set(shown(INFO, nvml)) == {name for name, value in vars(left).items() if value is not None}


def test_without_a_gpu_or_a_driver_there_is_nothing_rather_than_zero() -> None:
    loads: list[int] = []

    def missing() -> Any:
        loads.append(1)
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert shown(replace(INFO, device="cpu", device_id=""), Nvml(missing)) == {}
    assert not loads, "nobody looks for a driver on a CPU"
    nvml = Nvml(missing)
    assert shown(INFO, nvml) == shown(INFO, nvml) == {}
    assert len(loads) == 1, "it is looked for once"
    assert shown(INFO, Nvml(lambda: Library(init=9))) == {}  # NVML_ERROR_DRIVER_NOT_LOADED
    assert shown(replace(INFO, device_id="GPU-2"), Nvml(Library)) == {}, "another machine's"
