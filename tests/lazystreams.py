"""A device's queues without a device: what is put into them is done as late and in as odd an order as marks allow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from ropeway.runtime.streams import COMPUTE, DOWN, UP, Queue


class LazyMark:
    """Passed once the queue that it is in has come to it, at the `tick` of that."""

    def __init__(self, streams: LazyStreams) -> None:
        self._streams = streams
        self.tick: int | None = None

    def passed(self) -> bool:
        return self.tick is not None

    def wait(self) -> None:
        self._streams.run(lambda: self.tick is not None)

    def since(self, earlier: LazyMark) -> float:
        assert self.tick is not None
        assert earlier.tick is not None
        assert self.tick >= earlier.tick
        return float(self.tick - earlier.tick)


class LazyStreams:
    """Nothing happens until somebody waits for a mark. Then queues are served at random until it is passed: one of them
    may be done before another has begun. What is in `frozen` is not served. `ticks` counts what has been done."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._queues: dict[Queue, deque[Callable[[], object] | LazyMark | tuple[LazyMark]]] = {
            COMPUTE: deque(),
            UP: deque(),
            DOWN: deque(),
        }
        self._lock = threading.RLock()
        self.frozen: set[Queue] = set()
        self.ticks = 0
        self.closed = False

    def put(self, queue: Queue, work: Callable[[], object]) -> None:
        with self._lock:
            self._queues[queue].append(work)

    def mark(self, queue: Queue) -> LazyMark:
        mark = LazyMark(self)
        with self._lock:
            self._queues[queue].append(mark)
        return mark

    def after(self, queue: Queue, mark: LazyMark) -> None:
        with self._lock:
            self._queues[queue].append((mark,))

    def pinned(self, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(elements, dtype=dtype)

    def close(self) -> None:
        self.run(lambda: not any(self._queues.values()))
        self.closed = True

    def run(self, until: Callable[[], bool]) -> None:
        """Serve queues until `until` holds."""
        with self._lock:
            while not until():
                served = [queue for name, queue in self._queues.items() if name not in self.frozen]
                ready = [queue for queue in served if queue and not _waits(queue[0])]
                assert ready, "queues wait for each other"
                chosen = self._random.choice(ready)
                for _ in range(self._random.randrange(1, 4)):
                    if not chosen or _waits(chosen[0]):
                        break
                    self._serve(chosen.popleft())

    def _serve(self, item: Callable[[], object] | LazyMark | tuple[LazyMark]) -> None:
        self.ticks += 1
        if isinstance(item, LazyMark):
            item.tick = self.ticks
        elif not isinstance(item, tuple):
            with torch.inference_mode():  # whichever thread it is that waits
                item()


def _waits(item: object) -> bool:
    return isinstance(item, tuple) and not item[0].passed()
