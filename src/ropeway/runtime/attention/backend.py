"""The seam of attention: what a back end must do, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs

KvCacheDtype = Literal["auto", "int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number that codes of each kind stand for."""


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one model, equal for all layers but the window.

    `windows[l]` is the sliding window of layer l in tokens (a query at position p sees (p - window, p]), or None.
    With `softcap` c a scaled score s counts as c * tanh(s / c) (Gemma 2, Gemma Team 2024).

    `kv_cache_dtype` "int8" or "fp8" keeps K and V as codes of a byte with a float32 scale for each token and KV head of
    K, and one of V: x is stored as x / scale, rounded half to even to an integer or to an e4m3 number (Micikevicius et
    al. 2022), where scale = max|x| / 127 or max|x| / 448. fp8 keeps small elements beside a large one: int8 is finer
    for all others. Each costs 2 * kv_heads * (head_dim + 4) bytes per token and layer instead of 2 * kv_heads *
    head_dim elements.

    With `latent` n > 0 (multi-head latent attention, DeepSeek-AI 2024, absorbed) there is one KV head, and its V is the
    first n elements of its K, which are stored once.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    windows: tuple[int | None, ...]
    kv_cache_dtype: KvCacheDtype = "auto"
    softcap: float | None = None
    latent: int = 0

    @property
    def quantized(self) -> bool:
        """Whether the store holds codes and scales."""
        return self.kv_cache_dtype != "auto"

    @property
    def kv_dtype(self) -> torch.dtype:
        """The element type of the KV store. e4m3 numbers lie in it as plain bytes."""
        return {"auto": self.dtype, "int8": torch.int8, "fp8": torch.uint8}[self.kv_cache_dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes in the store for the scale of one token's K (or V) in one KV head."""
        return 4 if self.quantized else 0

    @property
    def vectors(self) -> int:
        """How many vectors of `head_dim` elements the store holds for each token and KV head."""
        return 1 if self.latent else 2

    @property
    def value_dim(self) -> int:
        """Elements of V, and so of each head's output."""
        return self.latent or self.head_dim


class AttentionBackend(Protocol):
    """Paged attention over a KV store of shape (num_blocks, layers, *block_shape).

    A block is contiguous over layers, so that one copy moves it. What lies inside `block_shape` (K and V of one layer
    of one block) is the back end's own choice of layout.

    `capturable` says that `prepare` and `forward` launch work that depends on shapes and on the ints of `BatchInputs`
    alone, and wait for nothing: a CUDA graph may hold them, and the host may run ahead of the device.
    """

    name: str
    capturable: bool

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """None if it can serve this model here, else the reason why not, for the start-up banner."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None: ...

    def block_shape(self) -> tuple[int, ...]:
        """Shape of one layer of one block, in elements of `spec.kv_dtype`: vectors * kv_heads * block_size * head_dim
        in all, and `scale_bytes` more for each token, KV head, and vector."""

    def prepare(self, inputs: BatchInputs) -> Any:
        """What all layers of a step share, computed once."""

    def forward(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: Any, rotation: Rotation | None = None
    ) -> Tensor:
        """Write K and V of the step's tokens into the store, then attend.

        `q` (T, heads, head_dim), `k` and `v` (T, kv_heads, head_dim), any row stride, last two dimensions contiguous;
        `rotation` is what `q` and `k` still need first, and may happen in place. `v` is not read where `latent` is set.
        `kv` is the whole store. Returns (T, heads * value_dim), contiguous. A row's result depends on that row alone,
        on a GPU up to rounding.
        """
