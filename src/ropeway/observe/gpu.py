"""How busy a GPU is, by its driver's own account.

NVIDIA's management library (NVML) comes with the driver. It is asked from whatever process shows the metrics: no CUDA,
no torch and no package is needed for that, and the engine does not notice.
Source: "NVML API Reference", NVIDIA: nvmlDeviceGetUtilizationRates, nvmlDeviceGetMemoryInfo, nvmlDeviceGetPowerUsage.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Reading:
    """`utilization` is the share of its last moments (up to a second) in which a GPU had a kernel to run, 0 to 1.
    None: this one does not say, as parts of a GPU (MIG) and some cheap ones do not."""

    utilization: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    power_watts: float | None = None


class Gpus(Protocol):
    """The GPUs of this machine."""

    def read(self, uuid: str) -> Reading | None:
        """How the one of that name is doing; None if there is nobody to ask."""


class _Rates(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Nvml:
    """Asks NVML, which `load` finds when it is first needed."""

    def __init__(self, load: Callable[[], Any] = lambda: ctypes.CDLL(LIBRARY)) -> None:
        self._load = load
        self._library: Any = None
        self._missing = False

    def read(self, uuid: str) -> Reading | None:
        library, handle = self._opened(), ctypes.c_void_p()
        if library is None or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
        rates, memory, power = _Rates(), _Memory(), ctypes.c_uint()
        # Each answers with 0, or with why it cannot be had.
        busy = not library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
        room = not library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        draw = not library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(power))
        return Reading(
            utilization=rates.gpu / 100 if busy else None,
            memory_bytes=memory.total if room else None,
            memory_used_bytes=memory.used if room else None,
            power_watts=power.value / 1000 if draw else None,
        )

    def _opened(self) -> Any:
        if self._library is None and not self._missing:
            try:
                library = self._load()
                self._missing = bool(library.nvmlInit_v2())
            except (OSError, AttributeError):  # no driver, or one from long ago
                self._missing = True
            else:
                self._library = None if self._missing else library
        return self._library
