"""The queues of a device. Work in one of them is done in order, beside the other queues and beside this process.

`COMPUTE` is where the model's own work goes; `UP` and `DOWN` carry what comes from RAM and what goes there. A mark is a
place in a queue: other queues, or this process, can wait until it is passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ropeway.errors import MemoryBudgetError
from ropeway.runtime.memory import gib
from ropeway.runtime.pages import own_pages

_cuda: Any = torch.cuda  # its streams and events have no types
Queue = Literal["compute", "up", "down"]
COMPUTE: Queue = "compute"
UP: Queue = "up"
DOWN: Queue = "down"


class Mark(Protocol):
    """A place in a queue; passed when all work put in before it is done."""

    def passed(self) -> bool: ...

    def wait(self) -> None:
        """Return when it is passed."""

    def since(self, earlier: Any) -> float:
        """Seconds from the passing of `earlier`, a mark of the same device, to that of this one; both are passed."""


class Streams(Protocol):
    """The queues of one device, used by one thread at a time."""

    def put(self, queue: Queue, work: Callable[[], object]) -> None:
        """Let `work`, which queues operations on tensors, queue them there. What it reads and writes must stay as it
        is, and alive, until they are done."""

    def mark(self, queue: Queue) -> Mark:
        """The end of what is in `queue` so far."""

    def after(self, queue: Queue, mark: Any) -> None:
        """What is put into `queue` from now on waits until `mark` is passed. This process does not wait."""

    def pinned(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Zeros (elements,) in RAM that the device reads and writes by itself. Raises MemoryBudgetError."""

    def close(self) -> None:
        """Wait for all work and give pinned memory back, which must not be used any more."""


class CudaStreams:
    """A GPU's: COMPUTE is torch's current stream at each call, the others are streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = {UP: _cuda.Stream(device), DOWN: _cuda.Stream(device)}
        self._pinned: list[Tensor] = []

    def put(self, queue: Queue, work: Callable[[], object]) -> None:
        with _cuda.stream(self._stream(queue)):
            work()

    def mark(self, queue: Queue) -> CudaMark:
        event = _cuda.Event(enable_timing=True, blocking=True)  # who waits for it sleeps
        event.record(self._stream(queue))
        return CudaMark(event)

    def after(self, queue: Queue, mark: CudaMark) -> None:
        self._stream(queue).wait_event(mark.event)

    def pinned(self, elements: int, dtype: torch.dtype) -> Tensor:
        # torch's own pinned memory is rounded up to a power of two, which for a large tier is far too much.
        memory = own_pages(elements, dtype)
        size = memory.untyped_storage().nbytes()
        status = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        if status:
            raise MemoryBudgetError(
                f"{gib(size)} of RAM cannot be pinned for the GPU (CUDA error {status}). "
                "Lower --kv-host-gib, or free memory."
            )
        self._pinned.append(memory)
        return memory

    def close(self) -> None:
        _cuda.synchronize(self._device)
        for memory in self._pinned:
            _cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._pinned.clear()

    def _stream(self, queue: Queue) -> Any:
        return self._own.get(queue) or _cuda.current_stream(self._device)


class CudaMark:
    """An event on a stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def passed(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def since(self, earlier: CudaMark) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1000


def open_streams(device: torch.device) -> CudaStreams | None:
    """The queues of `device`; None for a CPU, which does everything at once and in order."""
    return CudaStreams(device) if device.type == "cuda" else None
