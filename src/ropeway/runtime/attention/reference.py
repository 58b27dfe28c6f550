"""Paged attention in plain torch: the oracle for every other back end, and the one that works everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ropeway.runtime.attention.backend import LARGEST, AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs


@dataclass(frozen=True)
class ReferenceMeta:
    """One step as Python ints, read from the tensors once for all layers.

    `rows` holds (first token, count, tokens before) of each row that is computed by itself; `tables` its block ids.
    `decode` are the token indices of rows computed together (each of one token), with their padded tables and lengths.
    """

    blocks: Tensor
    offsets: Tensor
    rows: list[tuple[int, int, int]]
    tables: list[Tensor]
    decode: Tensor | None
    decode_tables: Tensor
    decode_lengths: Tensor


class ReferenceBackend:
    """Gathers each row's blocks and computes softmax(q k^T * scale) v in float32.

    The layout inside a block is (2, block_size, kv_heads, head_dim and any scale), K first, or with a latent only K. A
    KV head's query heads (grouped-query attention, Ainslie et al. 2023) are folded into the query's length, so that K
    and V are not expanded.
    """

    name = "reference"
    capturable = False

    def __init__(self, spec: AttentionSpec, device: torch.device, *, batch_decode: bool | None = None) -> None:
        """`batch_decode` computes all one-token rows of a step together. It pads them to the longest, so that a result
        may differ in its last bits from the same row alone; the default is to do so on accelerators only."""
        self.spec = spec
        self.device = device
        self.batch_decode = device.type != "cpu" if batch_decode is None else batch_decode

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        return None

    def block_shape(self) -> tuple[int, ...]:
        spec = self.spec
        return (spec.vectors, spec.block_size, spec.kv_heads, spec.head_dim + spec.scale_bytes)

    def prepare(self, inputs: BatchInputs) -> ReferenceMeta:
        size = self.spec.block_size
        slots = inputs.write_slots.long()
        first = inputs.cu_q.tolist()
        starts = inputs.starts.tolist()
        rows, tables, single = [], [], []
        for r in range(inputs.num_rows):
            count = first[r + 1] - first[r]
            if self.batch_decode and count == 1:
                single.append(r)
                continue
            rows.append((first[r], count, starts[r]))
            tables.append(inputs.block_tables[r, : -(-(starts[r] + count) // size)].long())
        index = torch.tensor(single, dtype=torch.long, device=inputs.device)
        return ReferenceMeta(
            blocks=slots // size,
            offsets=slots % size,
            rows=rows,
            tables=tables,
            decode=inputs.cu_q[index].long() if single else None,
            decode_tables=inputs.block_tables[index].long().clamp(min=0),
            decode_lengths=inputs.lengths[index].long(),
        )

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        meta: ReferenceMeta,
        rotation: Rotation | None = None,
    ) -> Tensor:
        spec = self.spec
        if rotation is not None:
            q, k = rotation(q, k)
        for part, vector in enumerate((k, v)[: spec.vectors]):
            kv[meta.blocks, layer, part, meta.offsets] = self._stored(vector)
        out = q.new_empty((q.shape[0], spec.heads * spec.value_dim))
        for (first, count, start), table in zip(meta.rows, meta.tables, strict=True):
            length = start + count
            # Blocks wholly before the window may belong to others by now, so they are not read.
            skip = max(0, start - (self.spec.windows[layer] or length) + 1) // self.spec.block_size
            base = skip * self.spec.block_size
            keys, values = (x.flatten(0, 1)[: length - base] for x in self._read(kv, layer, table[skip:]))
            seen = self._seen(torch.arange(start, length, device=q.device), base, length, layer)
            out[first : first + count] = self._attend(q[None, first : first + count], keys[None], values[None], seen)[0]
        if meta.decode is not None:
            keys, values = (x.flatten(1, 2) for x in self._read(kv, layer, meta.decode_tables))
            seen = self._seen(meta.decode_lengths - 1, 0, keys.shape[1], layer)[:, None]
            # Slots beyond a row's length were never written and may hold NaN, which a weight of zero would not silence.
            values = values.masked_fill(~seen.transpose(1, 2)[..., None], 0)
            out[meta.decode] = self._attend(q[meta.decode][:, None], keys, values, seen)[:, 0].to(out.dtype)
        return out

    def _stored(self, x: Tensor) -> Tensor:
        """`x` (..., head_dim) as the store holds it. The four bytes of a scale follow the elements."""
        kind = self.spec.kv_cache_dtype
        if kind == "auto":
            return x
        wide, most = x.float(), LARGEST[kind]
        scale = wide.abs().amax(-1, keepdim=True) / most  # NaN if an element is; infinite ones become NaN on loading
        scaled = (wide / scale.where(scale > 0, 1.0)).nan_to_num(0.0, most, -most)
        codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([codes, scale.view(codes.dtype)], dim=-1)

    def _read(self, kv: Tensor, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of `blocks` (...), each (..., block_size, kv_heads, its dimension)."""
        keys = self._loaded(kv[blocks, layer, 0])
        if self.spec.latent:
            return keys, keys[..., : self.spec.latent]
        return keys, self._loaded(kv[blocks, layer, 1])

    def _loaded(self, stored: Tensor) -> Tensor:
        """The inverse, up to rounding: (..., head_dim)."""
        if not self.spec.quantized:
            return stored
        codes, scale = stored[..., : self.spec.head_dim], stored[..., self.spec.head_dim :]
        numbers = codes.view(torch.float8_e4m3fn) if self.spec.kv_cache_dtype == "fp8" else codes
        return numbers.float() * scale.contiguous().view(torch.float32)

    def _seen(self, positions: Tensor, base: int, length: int, layer: int) -> Tensor:
        """(len(positions), length - base) True where the query at a position may look, of keys [base, length)."""
        keys = torch.arange(base, length, device=positions.device)
        seen = keys <= positions[:, None]
        window = self.spec.windows[layer]
        if window is not None:
            seen &= keys > positions[:, None] - window
        return seen

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """`q` (N, n, heads, head_dim), `k` and `v` (N, L, kv_heads, their dimension), `seen` (n, L) or (N, n, L)
        to (N, n, heads * value_dim) in float32."""
        spec = self.spec
        batch, count = q.shape[:2]
        group = spec.heads // spec.kv_heads
        folded = q.float().reshape(batch, count, spec.kv_heads, group, spec.head_dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(batch, spec.kv_heads, group * count, spec.head_dim)
        scores = (folded @ k.float().permute(0, 2, 3, 1)) * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.view(batch, spec.kv_heads, group, count, -1)
        mask = seen if seen.dim() == 2 else seen[:, None, None]
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
        mixed = weights.view(batch, spec.kv_heads, group * count, -1) @ v.float().permute(0, 2, 1, 3)
        mixed = mixed.view(batch, spec.kv_heads, group, count, spec.value_dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(batch, count, spec.heads * spec.value_dim)
