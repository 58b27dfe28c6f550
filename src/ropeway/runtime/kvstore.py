"""The memory of the KV cache: one tensor, a block contiguous over all layers so that one copy moves it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ropeway.contract import BlockCopy
from ropeway.errors import EngineError
from ropeway.runtime.blockfile import BlockFile
from ropeway.runtime.pages import huge_pages

DEVICE, HOST, DISK = "device", "host", "disk"


class KVStore:
    """`data` is (num_blocks, layers, *block_shape), zero at first. On a CPU its pages are taken as they are used.

    Beneath it may lie `host_blocks` more in RAM, which on a CPU is the same RAM, and a `disk`.
    """

    def __init__(
        self,
        num_blocks: int,
        layers: int,
        block_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        host_blocks: int = 0,
        disk: BlockFile | None = None,
    ) -> None:
        shape = (num_blocks, layers, *block_shape)
        self.bytes = prod(shape) * dtype.itemsize
        if device.type == "cpu":
            # A block is read whole, and blocks lie anywhere: huge pages spare most of the address translation.
            self.data: Tensor = huge_pages(prod(shape), dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.disk = disk
        self._tensors = {DEVICE: self.data}
        if host_blocks:
            host = (host_blocks, *shape[1:])
            self._tensors[HOST] = huge_pages(prod(host), dtype).view(host)

    def copy(self, copies: Sequence[BlockCopy]) -> tuple[list[float], list[bytes]]:
        """Carry out `copies` in order. Returns what each took, in seconds, and the keys of those whose source was
        damaged. Raises EngineError for a tier that does not exist here."""
        seconds, lost = [], []
        for copy in copies:
            if copy.source_tier == DISK and self.disk is not None:
                self.disk.expect(copy.source)
        for copy in copies:
            begun = time.perf_counter()
            if not self._copy(copy):
                lost.append(copy.key)
            seconds.append(time.perf_counter() - begun)
        return seconds, lost

    def close(self) -> None:
        """Let everything be written that is to outlive the process."""
        if self.disk is not None:
            self.disk.close()
            self.disk = None

    def _copy(self, copy: BlockCopy) -> bool:
        source, target = self._tensors.get(copy.source_tier), self._tensors.get(copy.target_tier)
        if source is not None and target is not None:
            target[copy.target].copy_(source[copy.source])
        elif source is not None and copy.target_tier == DISK and self.disk is not None:
            self.disk.write(copy.target, copy.key, _bytes(source[copy.source].cpu()).tobytes())
        elif target is not None and copy.source_tier == DISK and self.disk is not None:
            block = target[copy.target]
            staged = block if block.device.type == "cpu" else torch.empty_like(block, device="cpu")
            if not self.disk.read(copy.source, copy.key, _bytes(staged)):
                return False
            if staged is not block:
                block.copy_(staged)
        else:
            tiers = [*self._tensors, *([DISK] if self.disk is not None else [])]
            raise EngineError(
                f"A plan copies a block from {copy.source_tier!r} to {copy.target_tier!r}; "
                f"this executor has the tiers {', '.join(tiers)}."
            )
        return True


def _bytes(block: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return block.reshape(-1).view(torch.uint8).numpy().data
