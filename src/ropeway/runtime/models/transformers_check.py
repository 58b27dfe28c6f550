"""Compare a model with itself: short prompts through its own attention, and cut into steps through ours.

The steps mix two sequences, chunks and single tokens, and go over the end of a block, so that a layer that keeps a
state of its own, or lets one row see another, cannot pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropeway.errors import ModelError
from ropeway.modelspec import ModelSpec
from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.models.transformers_model import PAGED, TransformersModel

EXACT = 2e-3
"""Largest error of any position's logits in float32, as a share of their standard deviation."""
ROUNDED = 0.1
"""The same for half of the positions in shorter types, where rounding alone moves a few of them far: an expert that is
chosen by a hair is another one then."""


def check(model: TransformersModel, spec: ModelSpec, attention: AttentionSpec) -> float:
    """By how much logits with paged attention differ from those with the model's own, as a share of their standard
    deviation. Raises ModelError if that is more than rounding."""
    size = attention.block_size
    most = min(size + 5, spec.context_limit)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, min(spec.vocab, 1000), n).tolist() for n in (most, max(most // 3, 1))]
    with torch.inference_mode():
        expected = _own(model, prompts)
        found = _paged(model, prompts, attention)
    errors = torch.cat([(f - e).pow(2).mean(-1).sqrt() / e.std(-1) for f, e in zip(found, expected, strict=True)])
    exact = attention.dtype == torch.float32 and not attention.quantized
    error, allowed = (float(errors.max()), EXACT) if exact else (float(errors.median()), ROUNDED)
    if not error <= allowed:
        raise ModelError(
            f"{spec.architecture} cannot be served: with paged attention its logits differ by {error:.1e} of their "
            f"spread from those with its own attention, where {allowed:.0e} is rounding. Its layers do something that "
            "this way of computing them misses."
        )
    return error


def _own(model: TransformersModel, prompts: list[list[int]]) -> list[Tensor]:
    """Logits (n, vocab) of each prompt, with the attention of the model's own code."""
    model.model.set_attn_implementation("eager")
    try:
        return [
            model.model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
            for tokens in prompts
        ]
    finally:
        model.model.set_attn_implementation(PAGED)


def _paged(model: TransformersModel, prompts: list[list[int]], attention: AttentionSpec) -> list[Tensor]:
    """The same in steps, through a store of a few blocks."""
    size = attention.block_size
    shape = (4, attention.layers, *model.backend.block_shape())
    kv = torch.zeros(shape, dtype=attention.kv_dtype, device=model.device)
    tables = ([2, 0], [3, 1])
    starts = [0, 0]
    found: list[list[Tensor]] = [[], []]
    for counts in ((size - 2, 0), (1, 3), (3, 1), (1, 2), (1, 1), (size, size), (size, size)):
        ends = [min(s + n, len(p)) for s, n, p in zip(starts, counts, prompts, strict=True)]
        rows = [r for r in (1, 0) if ends[r] > starts[r]]
        if not rows:
            continue
        inputs = _inputs(prompts, rows, starts, ends, tables, size, model.device)
        logits = model.forward(inputs, kv)
        for r, part in zip(rows, torch.split(logits, [ends[r] - starts[r] for r in rows]), strict=True):
            found[r].append(part)
        starts = ends
    return [torch.cat(parts) for parts in found]


def _inputs(
    prompts: list[list[int]], rows: list[int], starts: list[int], ends: list[int], tables: Any, size: int,
    device: torch.device,
) -> BatchInputs:  # fmt: skip
    """A step that computes [starts[r], ends[r]) of prompt r for each of `rows`, with logits of every token."""
    spans = [(r, range(starts[r], ends[r])) for r in rows]
    counts = [len(span) for _, span in spans]
    width = max(-(-ends[r] // size) for r in rows)

    def tensor(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return BatchInputs(
        token_ids=tensor([prompts[r][p] for r, span in spans for p in span], torch.int64),
        positions=tensor([p for _, span in spans for p in span], torch.int64),
        cu_q=tensor([0, *np.cumsum(counts).tolist()]),
        starts=tensor([starts[r] for r in rows]),
        lengths=tensor([ends[r] for r in rows]),
        block_tables=tensor(
            [[b if i < -(-ends[r] // size) else -1 for i, b in enumerate(tables[r][:width])] for r in rows]
        ),
        write_slots=tensor([tables[r][p // size] * size + p % size for r, span in spans for p in span]),
        logits_rows=tensor(list(range(sum(counts))), torch.int64),
        max_count=max(counts),
        max_length=max(ends[r] for r in rows),
    )
