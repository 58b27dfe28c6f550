"""The seam of attention: what a back end must do, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ropeway.runtime.batch import BatchInputs


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one model, equal for all layers but the window.

    `windows[l]` is the sliding window of layer l in tokens (a query at position p sees (p - window, p]), or None.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    windows: tuple[int | None, ...]


class AttentionBackend(Protocol):
    """Paged attention over a KV store of shape (num_blocks, layers, *block_shape).

    A block is contiguous over layers, so that one copy moves it. What lies inside `block_shape` (K and V of one layer
    of one block) is the back end's own choice of layout.
    """

    name: str

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """None if it can serve this model here, else the reason why not, for the start-up banner."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None: ...

    def block_shape(self) -> tuple[int, ...]:
        """Shape of one layer of one block, in elements of `spec.dtype`: 2 * kv_heads * block_size * head_dim in all."""

    def prepare(self, inputs: BatchInputs) -> Any:
        """What all layers of a step share, computed once."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: Any) -> Tensor:
        """Write K and V of the step's tokens into the store, then attend.

        `q` (T, heads, head_dim), `k` and `v` (T, kv_heads, head_dim), rotary already applied, any row stride,
        last two dimensions contiguous. `kv` is the whole store. Returns (T, heads * head_dim), contiguous.
        A row's result depends on that row alone.
        """
