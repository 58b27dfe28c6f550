"""The FlashInfer back end over a stand-in for the package, which does what is documented of `plan` and `run`."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import test_attention as suite
from conformance.paged import spec_of
from conformance.test_attention import test_only_its_own_blocks_are_written
from ropeway.runtime.attention.flashinfer import FlashInferBackend, lacking

__all__ = ["test_only_its_own_blocks_are_written"]
HALF = {"dtype": torch.float16}


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, dense and in float32. Pages are in compressed rows: those of request r are
    `indices[indptr[r] : indptr[r + 1]]`, and the last of them holds `last_page_len[r]` tokens."""

    def __init__(self, workspace: Tensor, kv_layout: str = "NHD") -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, sm_scale: float,
        window_left: int, logits_soft_cap: float | None, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        assert paged_kv_indptr.dtype == paged_kv_indices.dtype == torch.int32
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert bool(((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all())
        queries, pages = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.rows = [
            (queries[r], queries[r + 1], paged_kv_indices[pages[r] : pages[r + 1]].long(),
             (pages[r + 1] - pages[r] - 1) * page_size + last)
            for r, last in enumerate(paged_kv_last_page_len.tolist())
        ]  # fmt: skip
        self.group = num_qo_heads // num_kv_heads
        self.scale, self.left, self.cap = sm_scale, window_left, logits_soft_cap
        self.types = (q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert (q.dtype, paged_kv_cache[0].dtype) == self.types
        return torch.cat([self.row(q[q0:q1], *paged_kv_cache, pages, n) for q0, q1, pages, n in self.rows])

    def row(self, q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, length: int) -> Tensor:
        k, v = (
            x[pages].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(self.group, dim=1)
            for x in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * self.scale
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        here = torch.arange(length - len(q), length)[:, None]
        there = torch.arange(length)[None]
        hidden = there > here
        if self.left >= 0:
            hidden |= there < here - self.left
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


@pytest.fixture
def make(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> suite.Make:
    package: Any = ModuleType("flashinfer")
    package.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    return lambda spec: FlashInferBackend(spec, device)


@pytest.mark.parametrize("shape", [(4, 2, 64, 8), (6, 2, 128, 32)])
def test_prefill_in_chunks_then_decode(make: suite.Make, shape: tuple[int, int, int, int]) -> None:
    suite.test_prefill_in_chunks_then_decode(make, *shape, HALF)


def test_ragged_rows_in_shuffled_blocks(make: suite.Make) -> None:
    suite.ragged_rows(make, HALF, (1, 2, 17, 40, 31))


def test_sliding_window(make: suite.Make) -> None:
    suite.sliding_window(make, 16, HALF, ((70, 3), (1, 1), (20, 5), (1, 0)))


def test_queries_and_keys_are_rotated_first(make: suite.Make) -> None:
    suite.rotation_first(make, 64, True, torch.float16, (20, 1))


def test_scores_are_capped(make: suite.Make) -> None:
    suite.test_scores_are_capped(make, torch.float16)


def test_what_it_lacks_is_said() -> None:
    assert lacking(spec_of(head_dim=64, dtype=torch.bfloat16)) is None
    assert "float32" in str(lacking(spec_of(head_dim=64)))
    assert "head_dim is 80" in str(lacking(spec_of(head_dim=80, dtype=torch.bfloat16)))
    assert "int8" in str(lacking(spec_of(head_dim=64, dtype=torch.bfloat16, kv_cache_dtype="int8")))
    assert "latent" in str(lacking(spec_of(head_dim=64, dtype=torch.bfloat16, kv_heads=1, latent=32)))
    assert "CUDA" in str(FlashInferBackend.supports(spec_of(), torch.device("cpu")))
