"""What lies between the products of latent attention, in one kernel: as one operation after the other."""

from __future__ import annotations

import pytest
import torch

from ropeway.modelspec import RopeSpec
from ropeway.modelspec.latent import LatentSpec
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.kernels.triton import latent as kernels
from ropeway.runtime.layers.latent import fill
from ropeway.runtime.layers.norm import RMSNorm
from ropeway.runtime.layers.rotary import rotary_tables


@pytest.mark.parametrize(
    "latent",
    [
        LatentSpec(rank=32, rope=8, nope=16, value=8),
        LatentSpec(rank=24, rope=12, nope=8, value=8, interleaved=False),
        LatentSpec(rank=16, rope=2, nope=4, value=4, q_rank=8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fill(latent: LatentSpec, dtype: torch.dtype, device: torch.device) -> None:
    tokens, heads = 7, 3
    norm = RMSNorm((torch.rand(latent.rank) + 0.5).to(dtype), 1e-6, TorchOps())
    tables = rotary_tables(RopeSpec(), latent.rope, 64, 40, device)
    positions = torch.randperm(40)[:tokens]
    # Both are parts of wider products, as in the layer without a latent for queries.
    down = torch.randn(tokens, heads * (latent.nope + latent.rope) + latent.width).to(dtype)
    queries = down[:, : -latent.width].unflatten(1, (heads, -1))
    kept = down.clone()
    q, k = kernels.fill(latent, queries, down[:, -latent.width :], norm, tables, positions)
    assert torch.equal(down, kept)
    expected_q, expected_k = fill(latent, queries, down[:, -latent.width :], norm, tables, positions)
    assert (q.shape, k.shape) == (expected_q.shape, expected_k.shape)
    # The norm rounds twice.
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
    torch.testing.assert_close(k, expected_k, **exact)
    torch.testing.assert_close(q[..., latent.rank :], expected_q[..., latent.rank :], **exact)
