"""Tokens chosen on the device: what the sorting oracle allows, by Triton's kernels and by plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.test_sample import KINDS, make_row, may_be
from ropeway.contract import SamplingParams
from ropeway.runtime.device_sampler import sample_torch
from ropeway.runtime.draw import NOT_FINITE
from ropeway.runtime.kernels.triton import sample as kernels
from ropeway.runtime.noise import uniforms

SMALL = kernels.Sizes(tile=64, room=64, chunk=128, ways=16)
"""So that a few hundred tokens make several tiles, and more candidates than there is room for."""
WAYS = {
    "torch": sample_torch,
    "triton": kernels.sample,
    "triton in small tiles": partial(kernels.sample, sizes=SMALL),
}
Choose = Callable[..., Tensor]


@pytest.fixture(scope="module", params=WAYS)
def choose(request: pytest.FixtureRequest) -> Choose:
    return WAYS[request.param]


def call(choose: Choose, logits: Tensor, wishes: list[SamplingParams], noise: np.ndarray) -> list[int]:
    def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    found = choose(
        logits,
        column([s.temperature for s in wishes]),
        column([max(0, s.top_k) for s in wishes], torch.int64),
        column([s.top_p for s in wishes]),
        column([s.min_p for s in wishes]),
        column(noise.tolist()),
    )
    assert found.dtype == torch.int64
    return found.tolist()


@settings(max_examples=12, phases=(Phase.generate,))
@given(data=st.data())
def test_equals_the_sorting_oracle(choose: Choose, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 2, 7, 64, 65, 200]))
    kind = data.draw(st.sampled_from(KINDS))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    rows = np.stack([make_row(kind, vocab, generator) for _ in range(2)])
    wishes = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0])),
            top_k=data.draw(st.sampled_from([0, 0, 1, 2, 50, 100, vocab - 1])),
            top_p=data.draw(st.sampled_from([1.0, 0.0001, 0.3, 0.5, 0.9, 0.999])),
            min_p=data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0])),
        )
        for _ in rows
    ]
    noise = uniforms([int(generator.integers(1 << 30)) for _ in rows], [1, 2])
    for row, token, s, u in zip(rows, call(choose, torch.tensor(rows), wishes, noise), wishes, noise, strict=True):
        if s.temperature == 0:
            assert token == int(row.argmax())
        else:
            assert token in may_be(row.astype(np.float64), s, u)


def test_all_ways_agree() -> None:
    logits = torch.tensor(np.random.default_rng(3).normal(size=(6, 130)) * 3, dtype=torch.float32)
    cuts = ((0, 1.0), (20, 1.0), (0, 0.9), (20, 0.9), (100, 0.999), (1, 1.0))
    wishes = [SamplingParams(temperature=0.8, top_k=k, top_p=p) for k, p in cuts]
    noise = uniforms(list(range(6)), [0] * 6)
    first, *others = (call(choose, logits, wishes, noise) for choose in WAYS.values())
    assert all(other == first for other in others)


def test_equal_logits_share_exactly(choose: Choose) -> None:
    """Half of 200 equal tokens are the 100 of lowest id, whatever the sums round to, and each gets its share."""
    noise = (np.arange(4) + 0.5) / 4
    logits = torch.tensor([0.0, 31.3, -7.1, 0.1])[:, None].repeat(1, 200)
    wishes = [
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=100),
    ]
    assert call(choose, logits, wishes, noise) == [12, 37, 62, 87]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_fails_alone(choose: Choose, bad: float) -> None:
    rows = torch.randn(4, 199)
    wishes = [SamplingParams(temperature=t, top_p=p) for t in (0.0, 1.0) for p in (1.0, 0.8)]
    noise = uniforms([1, 2, 3, 4], [0] * 4)
    clean = call(choose, rows, wishes, noise)
    for begin in (0, 1):
        broken = rows.clone()
        broken[begin, 0] = broken[begin + 2, 198] = bad
        expected = [NOT_FINITE if row in (begin, begin + 2) else token for row, token in enumerate(clean)]
        assert call(choose, broken, wishes, noise) == expected


def test_a_row_without_a_finite_logit(choose: Choose) -> None:
    wishes = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=3)]
    assert call(choose, torch.full((3, 70), -math.inf), wishes, np.array([0.1, 0.2, 0.3])) == [NOT_FINITE] * 3


def test_the_last_of_the_noise_is_within_the_row(choose: Choose) -> None:
    """At the largest number below 1 rounding may put the target beyond the sum."""
    logits = torch.randn(3, 150) * 5
    wishes = [SamplingParams(), SamplingParams(top_k=7), SamplingParams(top_p=0.6)]
    for row, token in enumerate(call(choose, logits, wishes, np.full(3, 1 - 2.0**-52))):
        assert 0 <= token < 150
        assert logits[row, token] > logits[row].max() - 20


def test_rows_that_cut_nothing_need_not_be_searched() -> None:
    logits = torch.randn(4, 100)
    wishes = [SamplingParams(temperature=t) for t in (0.0, 0.5, 1.0, 2.0)]
    noise = uniforms([1, 2, 3, 4], [0] * 4)
    assert call(partial(kernels.sample, truncates=False), logits, wishes, noise) == call(
        kernels.sample, logits, wishes, noise
    )


def test_no_rows(choose: Choose) -> None:
    assert call(choose, torch.empty(0, 50), [], np.array([])) == []


def test_frequencies() -> None:
    """Chi-square against the probabilities themselves, by torch: for the same noise the kernels draw the same."""
    count = 20000
    logits = torch.linspace(-2, 3, 40)[torch.randperm(40)]
    wish = SamplingParams(temperature=0.8, top_p=0.95)
    noise = uniforms(list(range(count)), [5] * count)
    found = np.array(call(sample_torch, logits.repeat(count, 1), [wish] * count, noise))
    p = torch.softmax(logits.double() / 0.8, 0).cpu().numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.95)) + 1]
    assert set(found) <= set(kept.tolist())
    expected = p[kept] / p[kept].sum() * count
    seen = np.bincount(found, minlength=40)[kept]
    assert ((seen - expected) ** 2 / expected).sum() < len(kept) + 5 * math.sqrt(2 * len(kept))
