"""The memory of the KV cache: one tensor, a block contiguous over all layers so that one copy moves it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ropeway.contract import BlockCopy
from ropeway.errors import EngineError
from ropeway.runtime.pages import huge_pages


class KVStore:
    """`data` is (num_blocks, layers, *block_shape), zero at first. On a CPU its pages are taken as they are used."""

    def __init__(
        self, num_blocks: int, layers: int, block_shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, layers, *block_shape)
        self.bytes = prod(shape) * dtype.itemsize
        if device.type == "cpu":
            # A block is read whole, and blocks lie anywhere: huge pages spare most of the address translation.
            self.data: Tensor = huge_pages(prod(shape), dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out `copies` in order. Raises EngineError for a tier that does not exist here."""
        for copy in copies:
            if copy.source_tier != "device" or copy.target_tier != "device":
                raise EngineError(
                    f"A plan copies a block from {copy.source_tier!r} to {copy.target_tier!r}; "
                    "this executor has only the tier 'device'."
                )
            self.data[copy.target].copy_(self.data[copy.source])
