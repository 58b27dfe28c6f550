"""A small world of sequences over a paged KV store, with its own dense float64 attention to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.batch import BatchInputs


def spec_of(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    windows: tuple[int | None, ...] = (None, None),
    *,
    int8_kv: bool = False,
) -> AttentionSpec:
    return AttentionSpec(
        layers=len(windows),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        scale=head_dim**-0.5,
        windows=windows,
        int8_kv=int8_kv,
    )


@dataclass
class Line:
    """A sequence: its whole q, k, v (drawn once), how much is computed, and its blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class World:
    """`store` starts as NaN everywhere, so that a read of anything never written shows. (With int8 it is the scales
    that are NaN: four bytes of -1 are one.)"""

    def __init__(self, spec: AttentionSpec, num_blocks: int, *, seed: int = 0) -> None:
        self.spec = spec
        self.random = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_blocks, generator=self.random).tolist()
        self.num_blocks = num_blocks

    def store(self, backend: AttentionBackend) -> Tensor:
        shape = (self.num_blocks, self.spec.layers, *backend.block_shape())
        return torch.full(shape, -1 if self.spec.int8_kv else math.nan, dtype=self.spec.kv_dtype)

    def line(self, length: int) -> Line:
        """A new sequence of `length` tokens. q, k and v are views of one fused tensor, as a model makes them."""
        s = self.spec
        fused = torch.randn(length, (s.heads + 2 * s.kv_heads) * s.head_dim, generator=self.random).to(s.dtype)
        q, k, v = fused.split([s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim], dim=1)
        blocks = [self.free.pop() for _ in range(-(-length // s.block_size))]
        return Line(
            q.view(length, s.heads, s.head_dim),
            k.view(length, s.kv_heads, s.head_dim),
            v.view(length, s.kv_heads, s.head_dim),
            blocks=blocks,
        )

    def inputs(self, rows: Sequence[tuple[Line, int]], *, padding: int = 0) -> BatchInputs:
        """The step that computes the next `count` tokens of each line. `padding` adds columns of -1 to the tables."""
        size = self.spec.block_size
        cu, starts, lengths, tables, slots, positions = [0], [], [], [], [], []
        for line, count in rows:
            cu.append(cu[-1] + count)
            starts.append(line.computed)
            lengths.append(line.computed + count)
            tables.append(line.blocks[: -(-lengths[-1] // size)])
            for p in range(line.computed, line.computed + count):
                positions.append(p)
                slots.append(line.blocks[p // size] * size + p % size)
        width = max(map(len, tables)) + padding
        int32 = torch.int32
        return BatchInputs(
            token_ids=torch.zeros(cu[-1], dtype=torch.long),
            positions=torch.tensor(positions),
            cu_q=torch.tensor(cu, dtype=int32),
            starts=torch.tensor(starts, dtype=int32),
            lengths=torch.tensor(lengths, dtype=int32),
            block_tables=torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=int32),
            write_slots=torch.tensor(slots, dtype=int32),
            logits_rows=torch.tensor(cu[1:]) - 1,
            max_count=max(count for _, count in rows),
            max_length=max(lengths),
        )

    def step(
        self,
        backend: AttentionBackend,
        store: Tensor,
        rows: Sequence[tuple[Line, int]],
        *,
        layer: int = 0,
        padding: int = 0,
    ) -> list[Tensor]:
        """Compute a step of one layer and return each row's output, (count, heads, head_dim). Advances the lines."""
        s = self.spec
        meta = backend.prepare(self.inputs(rows, padding=padding))
        parts = [
            torch.cat([x[line.computed : line.computed + count].flatten(1) for x in (line.q, line.k, line.v)], dim=1)
            for line, count in rows
        ]
        fused = torch.cat(parts)
        kv_width = s.kv_heads * s.head_dim
        q, k, v = fused.split([s.heads * s.head_dim, kv_width, kv_width], dim=1)
        tokens = fused.shape[0]
        out = backend.forward(
            layer,
            q.view(tokens, s.heads, s.head_dim),
            k.view(tokens, s.kv_heads, s.head_dim),
            v.view(tokens, s.kv_heads, s.head_dim),
            store,
            meta,
        )
        assert out.shape == (tokens, s.heads * s.head_dim)
        assert out.dtype == s.dtype
        for line, count in rows:
            line.computed += count
        return list(out.view(tokens, s.heads, s.head_dim).split([count for _, count in rows]))

    def expected(self, line: Line, start: int, count: int, *, layer: int = 0) -> Tensor:
        """Dense attention in float64 of tokens [start, start + count), with K and V expanded over the groups, and
        rounded to int8 if the store holds that."""
        s = self.spec
        group = s.heads // s.kv_heads
        q = line.q[start : start + count].double().transpose(0, 1)
        k, v = (quantized(x) if s.int8_kv else x for x in (line.k[: start + count], line.v[: start + count]))
        k = k.double().repeat_interleave(group, dim=1).transpose(0, 1)
        v = v.double().repeat_interleave(group, dim=1).transpose(0, 1)
        scores = q @ k.transpose(1, 2) * s.scale
        here = torch.arange(start, start + count)[:, None]
        there = torch.arange(start + count)[None]
        hidden = there > here
        window = s.windows[layer]
        if window is not None:
            hidden |= there <= here - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(0, 1)


def quantized(x: Tensor) -> Tensor:
    """`x` after a visit to int8, with one scale for each vector of the last dimension."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round() * scale


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """float32 within 2e-5 of outputs of order one; bfloat16 within 1.5 % of the largest output, which allows for
    rounded weights (2^-9 each) and a rounded result (2^-9)."""
    limit = 2e-5 if actual.dtype == torch.float32 else 0.015 * max(1.0, float(expected.abs().max()))
    error = (actual.double() - expected).abs().max()
    assert not actual.isnan().any(), "the output holds NaN: something unwritten was read"
    assert error <= limit, f"largest error {error:.2e}, allowed {limit:.2e}"
