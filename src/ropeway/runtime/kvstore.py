"""The memory of the KV cache: one tensor, a block contiguous over all layers so that one copy moves it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ropeway.contract import BlockCopy
from ropeway.runtime.blockfile import BlockFile
from ropeway.runtime.pages import huge_pages
from ropeway.runtime.streams import Streams, open_streams
from ropeway.runtime.transfer import DEVICE, HOST, Direct, Mover, Moving, Queued


class KVStore:
    """`data` is (num_blocks + 1, layers, *block_shape), zero at first. On a CPU its pages are taken as they are used.
    The last block, `scratch`, belongs to no sequence: rows that only fill up a step write there.

    Beneath it may lie `host_blocks` more in RAM, which on a CPU is the same RAM, and a `disk`. `streams` are the
    device's queues, for copies beside the model's work; unless told otherwise a GPU's own. Raises MemoryBudgetError if
    there is not enough RAM for the host tier.
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
        streams: Streams | None = None,
    ) -> None:
        self.scratch = num_blocks
        shape = (num_blocks + 1, layers, *block_shape)
        self.bytes = num_blocks * prod(shape[1:]) * dtype.itemsize
        if device.type == "cpu":
            # A block is read whole, and blocks lie anywhere: huge pages spare most of the address translation.
            self.data: Tensor = huge_pages(prod(shape), dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.disk = disk
        self._streams = (streams or open_streams(device)) if host_blocks or disk is not None else None
        host = None
        if host_blocks:
            size = host_blocks * prod(shape[1:])
            rows = huge_pages(size, dtype) if self._streams is None else self._streams.pinned(size, dtype)
            host = rows.view(host_blocks, *shape[1:])
        self._mover: Mover
        if self._streams is None:
            self._mover = Direct({DEVICE: self.data} | ({} if host is None else {HOST: host}), disk)
        else:
            self._mover = Queued(self.data, host, disk, self._streams)

    def begin(self, copies: Sequence[BlockCopy]) -> Moving:
        """Start `copies`, in order. Whatever is computed from now on finds them done, and whatever was queued on the
        device before still finds what was there. Raises EngineError for a tier that does not exist here."""
        return self._mover.begin(copies)

    def close(self) -> None:
        """Let everything be written that is to outlive the process. The host tier's memory is given back."""
        self._mover.close()
        if self.disk is not None:
            self.disk.close()
            self.disk = None
        if self._streams is not None:
            self._streams.close()
            self._streams = None
