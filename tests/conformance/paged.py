"""A small world of sequences over a paged KV store, with its own dense float64 attention to compare with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs

CPU = torch.device("cpu")


def spec_of(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    windows: tuple[int | None, ...] = (None, None),
    **further: Any,
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
        **further,
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
    """All that a sequence has lies on the CPU; a step takes it to the back end's device and its outputs back.

    `store` starts as NaN everywhere, so that a read of anything never written shows. (Where it holds codes it is the
    scales that are NaN: four bytes of ones are one.)
    """

    def __init__(self, spec: AttentionSpec, num_blocks: int, *, seed: int = 0) -> None:
        self.spec = spec
        self.random = torch.Generator("cpu").manual_seed(seed)
        self.free = torch.randperm(num_blocks, generator=self.random, device=CPU).tolist()
        self.num_blocks = num_blocks

    def store(self, backend: AttentionBackend) -> Tensor:
        shape = (self.num_blocks, self.spec.layers, *backend.block_shape())
        empty = {torch.int8: -1, torch.uint8: 255}.get(self.spec.kv_dtype, math.nan)
        return torch.full(shape, empty, dtype=self.spec.kv_dtype, device=backend.device)

    def parts(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as views of one fused tensor (T, all of them side by side), as a model makes them. With a latent
        V is a part of K."""
        s = self.spec
        heads = fused.view(fused.shape[0], -1, s.head_dim)
        q, k = heads[:, : s.heads], heads[:, s.heads : s.heads + s.kv_heads]
        return q, k, k[..., : s.latent] if s.latent else heads[:, s.heads + s.kv_heads :]

    def line(self, length: int) -> Line:
        """A new sequence of `length` tokens."""
        s = self.spec
        width = (s.heads + s.vectors * s.kv_heads) * s.head_dim
        fused = torch.randn(length, width, generator=self.random, device=CPU).to(s.dtype)
        blocks = [self.free.pop() for _ in range(-(-length // s.block_size))]
        return Line(*self.parts(fused), blocks=blocks)

    def inputs(self, rows: Sequence[tuple[Line, int]], *, padding: int = 0, beyond: int = -1) -> BatchInputs:
        """The step that computes the next `count` tokens of each line. `padding` adds columns to the tables; what lies
        behind a row's blocks is `beyond`."""
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

        def tensor(values: list[Any], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=CPU)

        return BatchInputs(
            token_ids=torch.zeros(cu[-1], dtype=torch.long, device=CPU),
            positions=tensor(positions, torch.long),
            cu_q=tensor(cu),
            starts=tensor(starts),
            lengths=tensor(lengths),
            block_tables=tensor([t + [beyond] * (width - len(t)) for t in tables]),
            write_slots=tensor(slots),
            logits_rows=tensor(cu[1:], torch.long) - 1,
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
        rotation: Callable[[Tensor], Rotation] | None = None,
        static: bool = False,
    ) -> list[Tensor]:
        """Compute a step of one layer and return each row's output, (count, heads, value_dim). Advances the lines.

        `rotation` makes the rotation of given positions. A `static` step is one as a captured graph replays it: block
        tables are wider than any row needs, with old ids in them, and `max_length` is only a bound.
        """
        s = self.spec
        if static:
            inputs = self.inputs(rows, padding=5, beyond=self.num_blocks - 1)
            inputs = dataclasses.replace(inputs, max_length=inputs.block_tables.shape[1] * s.block_size)
        else:
            inputs = self.inputs(rows, padding=padding)
        inputs = on(inputs, backend.device)
        q, k, v = self.parts(
            torch.cat(
                [
                    torch.cat([x[line.computed : line.computed + count].flatten(1) for x in self._drawn(line)], dim=1)
                    for line, count in rows
                ]
            ).to(backend.device)
        )
        turn = {} if rotation is None else {"rotation": rotation(inputs.positions)}
        out = backend.forward(layer, q, k, v, store, backend.prepare(inputs), **turn).cpu()
        assert out.shape == (inputs.num_tokens, s.heads * s.value_dim)
        assert out.dtype == s.dtype
        for line, count in rows:
            line.computed += count
        return list(out.view(-1, s.heads, s.value_dim).split([count for _, count in rows]))

    def _drawn(self, line: Line) -> tuple[Tensor, ...]:
        return (line.q, line.k) if self.spec.latent else (line.q, line.k, line.v)

    def expected(self, line: Line, start: int, count: int, *, layer: int = 0) -> Tensor:
        """Dense attention in float64 of tokens [start, start + count), with K and V expanded over the groups, and
        rounded to codes if the store holds those."""
        s = self.spec
        group = s.heads // s.kv_heads
        q = line.q[start : start + count].double().transpose(0, 1)
        k, v = (coded(x[: start + count], s.kv_cache_dtype) for x in (line.k, line.v))
        if s.latent:
            v = k[..., : s.latent]
        k = k.double().repeat_interleave(group, dim=1).transpose(0, 1)
        v = v.double().repeat_interleave(group, dim=1).transpose(0, 1)
        scores = q @ k.transpose(1, 2) * s.scale
        if s.softcap is not None:
            scores = s.softcap * torch.tanh(scores / s.softcap)
        here = torch.arange(start, start + count, device=CPU)[:, None]
        there = torch.arange(start + count, device=CPU)[None]
        hidden = there > here
        window = s.windows[layer]
        if window is not None:
            hidden |= there <= here - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(0, 1)


def on(inputs: BatchInputs, device: torch.device) -> BatchInputs:
    """The same step on another device."""
    tensors = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return dataclasses.replace(inputs, **{n: x.to(device) for n, x in tensors.items() if isinstance(x, Tensor)})


def coded(x: Tensor, kind: str) -> Tensor:
    """`x` after a visit to a store of `kind`, with one scale for each vector of the last dimension."""
    if kind == "auto":
        return x
    scale = x.float().abs().amax(-1, keepdim=True) / (127 if kind == "int8" else 448)
    y = x.float() / scale
    return (y.round() if kind == "int8" else y.to(torch.float8_e4m3fn).float()) * scale


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """float32 within 2e-5 of outputs of order one; shorter types within 1.5 % of the largest output, which allows for
    rounded weights (2^-9 each) and a rounded result (2^-9)."""
    limit = 2e-5 if actual.dtype == torch.float32 else 0.015 * max(1.0, float(expected.abs().max()))
    error = (actual.double() - expected).abs().max()
    assert not actual.isnan().any(), "the output holds NaN: something unwritten was read"
    assert error <= limit, f"largest error {error:.2e}, allowed {limit:.2e}"
