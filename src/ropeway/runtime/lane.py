"""What devices do differently about a step: bring its inputs, take its tokens back, time it, and record it for replay.

All of a step goes through one queue of the device: inputs, model, sampling, and the way back of the tokens. Steps are
queued in the order of their plans, so a step finds everything that those before it have written, and nothing that it
overwrites can still be wanted by one of them. The host runs ahead and waits for nothing but tokens. Second queues for
the few kilobytes of inputs and tokens would cost as much in events as they could hide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_ALIGNED = 16


class Fetch(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> Array:
        """Its values, once they are there."""


class Lane(Protocol):
    """`overlaps` says whether the device goes on by itself while the host prepares the next step."""

    device: torch.device
    overlaps: bool

    def stage(self, *arrays: Array) -> list[Tensor]:
        """`arrays` (of int32, int64, float32 or float64) on the device. They must be fresh: nobody may change them
        afterwards, since the copying may go on until the step has been computed."""

    def fetch(self, tensor: Tensor) -> Fetch:
        """Have `tensor` copied to the host as it will be once all that was queued so far is done."""

    def mark(self) -> Any:
        """A mark behind all that was queued so far."""

    def seconds(self, first: Any, last: Any) -> float:
        """The device's time from one mark to a later one, for which this waits."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run `step` once, and record it: the result queues the very same work again, on the same memory, all of which
        but what `step` itself allocates must stay where it is. `step` may not wait for the device, nor look at what is
        in a tensor."""

    def check(self) -> None:
        """Raise what the device has to say if it cannot go on at all."""


class CpuLane:
    """The CPU computes while it is told to, so everything is there at once. Recording is remembering what to call."""

    overlaps = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def stage(self, *arrays: Array) -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]

    def fetch(self, tensor: Tensor) -> Fetch:
        return _There(tensor.clone())

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def check(self) -> None:
        pass


class _There:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Array:
        found: Array = self._tensor.numpy()
        return found


class CudaLane:
    """The current stream of a CUDA device. Waiting sleeps rather than spins: with a second step queued the device does
    not feel it.

    Pinned memory comes from torch's allocator, which hands it out again only after the copies that use it are done.
    """

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def stage(self, *arrays: Array) -> list[Tensor]:
        """In one transfer."""
        places, size = layout(arrays)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pack(arrays, places, pinned)
        return unpack(arrays, places, pinned.to(self.device, non_blocking=True))

    def fetch(self, tensor: Tensor) -> Fetch:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        return _Coming(pinned, self._record())

    def mark(self) -> torch.cuda.Event:
        return self._record(timing=True)

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                step()  # compiles kernels and takes work space, which cannot be recorded
                self._side.synchronize()
                # Other threads, such as one that frees memory, need not stand still for it.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                except Exception:
                    with suppress(RuntimeError):  # it only says that what was recorded is of no use
                        graph.capture_end()
                    raise
                graph.capture_end()
            current.wait_stream(self._side)
        return graph.replay

    def check(self) -> None:
        # After an illegal access, say, every call fails until the process ends.
        torch.cuda.synchronize(self.device)

    def _record(self, *, timing: bool = False) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


class _Coming:
    def __init__(self, pinned: Tensor, event: torch.cuda.Event) -> None:
        self._pinned, self._event = pinned, event

    def wait(self) -> Array:
        self._event.synchronize()
        found: Array = self._pinned.numpy()
        return found


def lane_for(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else CpuLane(device)


def layout(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """Where each of `arrays` begins in one buffer, in bytes, and the size of the buffer."""
    places, size = [], 0
    for array in arrays:
        places.append(size)
        size += -(-array.nbytes // _ALIGNED) * _ALIGNED
    return places, size


def pack(arrays: Sequence[Array], places: Sequence[int], buffer: Tensor) -> None:
    """Write `arrays` into `buffer` (bytes,) uint8 on the CPU."""
    memory = buffer.numpy()
    for array, place in zip(arrays, places, strict=True):
        if array.size:
            memory[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def unpack(arrays: Sequence[Array], places: Sequence[int], buffer: Tensor) -> list[Tensor]:
    """Tensors like `arrays` over `buffer` (bytes,) uint8, which holds them at `places`."""
    return [
        buffer[place : place + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
        for array, place in zip(arrays, places, strict=True)
    ]
