"""The memory of a device as it is asked for it: what is free, what this process holds, what a step took at its peak."""

from __future__ import annotations

import re
from typing import Protocol

import torch

from ropeway.runtime.memory import MemoryState, cpu_memory, gib

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)|you tried to allocate (\d+ bytes)")
_SIGNS = ("allocate memory", "out of memory", "ALLOC_FAILED")
"""How a RuntimeError of torch's says so, for a CPU, for the driver, and for NVIDIA's libraries."""


class DeviceMemory(Protocol):
    """Bytes of one device. `measures` says whether it counts what this process holds there."""

    measures: bool

    def state(self) -> MemoryState:
        """What the device has, and what of it is free for this process."""

    def held(self) -> int:
        """What this process's tensors hold, with what is kept for the next ones."""

    def peak(self) -> int:
        """The most that was held since `watch`, after waiting for all work on the device."""

    def watch(self) -> None:
        """Start a new peak."""

    def release(self) -> None:
        """Give back what is kept for the next tensors and not in use."""

    def describe(self, error: Exception) -> str:
        """If `error` says that memory ran out, a sentence with numbers; else ''."""


class CpuMemory:
    """RAM. Pages are taken as they are touched and given back at once, so that there is nothing to count or release."""

    measures = False

    def state(self) -> MemoryState:
        return cpu_memory()

    def held(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def watch(self) -> None:
        pass

    def release(self) -> None:
        pass

    def describe(self, error: Exception) -> str:
        if not ran_out(error):
            return ""
        return f"Memory ran out{asked_for(error)}; {gib(self.state().free)} {self.state().limit} are free now."


class CudaMemory:
    """A GPU's, as its driver and torch's allocator count it. The driver's own share of it is in use from the first
    call on."""

    measures = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state(self) -> MemoryState:
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryState(total, free, "of the GPU's memory")

    def held(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def watch(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def describe(self, error: Exception) -> str:
        if not ran_out(error):
            return ""
        state = self.state()
        return (
            f"The GPU's memory ran out{asked_for(error)}: {gib(state.free)} of {gib(state.total)} are free, and this "
            f"process holds {gib(self.held())}, {gib(torch.cuda.memory_allocated(self._device))} of it in use. "
            "Lower --max-num-batched-tokens, --max-num-seqs or --gpu-memory-utilization."
        )


def open_memory(device: torch.device) -> DeviceMemory:
    """The memory of `device`."""
    return CudaMemory(device) if device.type == "cuda" else CpuMemory()


def ran_out(error: Exception) -> bool:
    """Whether `error` says that an allocation failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def asked_for(error: Exception) -> str:
    """How much was wanted, if the error says so."""
    found = _ASKED.search(str(error))
    return f" when {found[1] or found[2]} more were wanted" if found else ""
