"""Latent attention in the absorbed form against the paper's own formula, which expands keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from many_ways import logits, spread
from torch import Tensor

from checkpoints import prompt
from expert_checkpoints import LATENT
from ropeway.modelspec import ModelSpec, RopeSpec, load_spec
from ropeway.modelspec.latent import LatentSpec
from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.layers.latent import LatentAttention
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.norm import RMSNorm
from ropeway.runtime.layers.rotary import rotary_tables

Make = Callable[[str], Path]
CPU = torch.device("cpu")
TOKENS, HIDDEN, HEADS, BLOCK = 11, 32, 3, 8


def model(latent: LatentSpec) -> ModelSpec:
    return ModelSpec(
        name="m", directory=Path(), architecture="DeepseekV3ForCausalLM", layers=1, hidden=HIDDEN, intermediate=32,
        heads=HEADS, kv_heads=1, head_dim=latent.width, vocab=8, rope=RopeSpec(), max_position=64, context_limit=64,
        dtype="float32", windows=(None,), latent=latent,
    )  # fmt: skip


def turned(x: Tensor, latent: LatentSpec) -> Tensor:
    """`x` (T, heads, rope) as complex numbers (T, heads, rope / 2), those of token t turned by its position."""
    pairs = x.unflatten(-1, (-1, 2)) if latent.interleaved else torch.stack(x.chunk(2, dim=-1), dim=-1)
    exponents = torch.arange(0, latent.rope, 2, dtype=torch.float64) / latent.rope
    angles = torch.arange(TOKENS)[:, None, None] * 10000.0**-exponents
    return torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)


def expanded(x: Tensor, spec: ModelSpec, down: Tensor, up: Tensor | None, kv_up: Tensor, out: Tensor) -> Tensor:
    """Equations 9 to 19 of the DeepSeek-V2 paper (arXiv:2405.04434), one sequence, in float64."""
    latent = spec.latent
    assert latent is not None
    found = x.double() @ down.double().T
    queries, kept, rope = found.split([found.shape[1] - latent.width, latent.rank, latent.rope], dim=1)

    def normed(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    queries = queries if up is None else normed(queries) @ up.double().T
    queries = queries.view(TOKENS, HEADS, -1)
    keys, values = (normed(kept) @ kv_up.double().T).view(TOKENS, HEADS, -1).split([latent.nope, latent.value], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", queries[..., : latent.nope], keys)
    q, k = turned(queries[..., latent.nope :], latent), turned(rope[:, None], latent)
    scores += torch.einsum("qhd,kd->hqk", q, k[:, 0].conj()).real
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    weights = (scores * spec.scale).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1) @ out.double().T


@pytest.mark.parametrize(
    "latent",
    [
        LatentSpec(rank=16, rope=8, nope=12, value=10, q_rank=20),
        LatentSpec(rank=24, rope=4, nope=8, value=16),
        LatentSpec(rank=8, rope=2, nope=4, value=4, interleaved=False),
    ],
)
@pytest.mark.parametrize("chunk", [TOKENS, 4, 1])
def test_absorbed_equals_expanded(latent: LatentSpec, chunk: int) -> None:
    torch.manual_seed(3)
    spec, queries = model(latent), HEADS * (latent.nope + latent.rope)
    attention = AttentionSpec(
        layers=1, heads=HEADS, kv_heads=1, head_dim=latent.width, block_size=BLOCK, dtype=torch.float32,
        scale=spec.scale, windows=(None,), latent=latent.rank,
    )  # fmt: skip
    backend = ReferenceBackend(attention, CPU)
    x = torch.randn(TOKENS, HIDDEN)
    down = torch.randn((latent.q_rank or queries) + latent.width, HIDDEN)
    up = torch.randn(queries, latent.q_rank) if latent.q_rank else None
    kv_up = torch.randn(HEADS * (latent.nope + latent.value), latent.rank)
    out = torch.randn(HIDDEN, HEADS * latent.value)
    ops = TorchOps()
    layer = LatentAttention(
        spec,
        0,
        PackedLinear(down, level=0),
        kv_up,
        RMSNorm(torch.ones(latent.rank), 1e-6, ops),
        PackedLinear(out, level=0),
        backend,
        None if up is None else PackedLinear(up, level=0),
        RMSNorm(torch.ones(latent.q_rank), 1e-6, ops) if latent.q_rank else None,
    )
    tables = rotary_tables(RopeSpec(), latent.rope, 64, TOKENS, CPU)
    kv = torch.zeros(2, 1, *backend.block_shape())
    found = []
    for start in range(0, TOKENS, chunk):
        end = min(start + chunk, TOKENS)
        positions = torch.arange(start, end)
        inputs = BatchInputs(
            token_ids=positions, positions=positions, cu_q=torch.tensor([0, end - start], dtype=torch.int32),
            starts=torch.tensor([start], dtype=torch.int32), lengths=torch.tensor([end], dtype=torch.int32),
            block_tables=torch.tensor([[0, 1]], dtype=torch.int32), write_slots=positions.int(),
            logits_rows=positions[:0], max_count=end - start, max_length=end,
        )  # fmt: skip
        found.append(layer(x[start:end], tables, positions, kv, backend.prepare(inputs)))
    expected = expanded(x, spec, down, up, kv_up, out)
    error = (torch.cat(found).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("kind", LATENT)
def test_the_cache_holds_one_latent_for_all_heads(experts: Make, kind: str) -> None:
    spec = load_spec(experts(kind))
    assert spec.kv_bytes_per_token("float32") == 3 * (32 + 8) * 4


def test_a_cache_of_bytes_is_near(experts: Make) -> None:
    tokens = prompt(5, 40)
    found = spread(logits(experts("deepseek-v2"), tokens, kv_cache_dtype="int8"), experts("deepseek-v2"), tokens)
    assert 0 < found < 0.2
