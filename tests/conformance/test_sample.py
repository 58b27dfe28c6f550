"""The native sampler on every instruction set, and the torch one, against a float64 oracle that sorts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from native import library_of
from ropeway.contract import SamplingParams
from ropeway.errors import EngineError, NumericalError, RequestError, RopewayError
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.noise import uniforms
from ropeway.runtime.sampler import Sampler, Want
from ropeway.runtime.slots import Slot, bitmask

SLACK = 3e-6
"""Relative difference of sums in float32 and float64, within which either neighbour is right."""


@pytest.fixture(scope="module", params=["torch", *VARIANTS])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "torch":
        return Sampler(TorchOps())
    return Sampler(TorchOps(), library_of(request.param))


def want(sampling: SamplingParams, seed: int, tokens: list[int], generated: int = 0) -> Want:
    known = np.array([*tokens], dtype=np.int32)
    return Want(Slot(0, 0, len(tokens) - generated, len(known), 1, sampling, (2,), seed), known)


def may_be(logits: np.ndarray, s: SamplingParams, u: float) -> set[int]:
    """The token that the definition chooses, and what rounding can make of it."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    p = np.exp((logits[order] - logits.max()) / s.temperature)
    kept = np.ones(len(p), dtype=bool)
    if s.min_p > 0:
        kept &= p >= s.min_p * (1 - SLACK)
    if s.top_k > 0:
        kept[s.top_k :] = False
    p = np.where(kept, p, 0)
    found: set[int] = set()
    for share in {s.top_p * (1 - SLACK), s.top_p * (1 + SLACK)} if s.top_p < 1 else {math.inf}:
        inside = np.where(np.cumsum(p) - p < share * p.sum(), p, 0)
        cumulative = np.empty_like(p)
        cumulative[order] = inside
        cumulative = np.cumsum(cumulative)
        for shifted in (u - SLACK, u + SLACK):
            target = min(max(shifted, 0.0), 1 - 1e-12) * cumulative[-1]
            found.add(int(np.searchsorted(cumulative, target, side="right")))
    return found


KINDS = ("normal", "peaked", "coarse", "two values", "equal", "masked", "extreme")


def make_row(kind: str, vocab: int, generator: np.random.Generator) -> np.ndarray:
    row = generator.normal(size=vocab).astype(np.float32)
    if kind == "peaked":
        row = row * 4 + 12 * (generator.random(vocab) < 0.002)
    elif kind == "coarse":  # as the bfloat16 product of a large vocabulary: hundreds of equals
        row = np.round(row * 8) / 8
    elif kind == "two values":
        row = (generator.random(vocab) < 0.3).astype(np.float32)
    elif kind == "equal":
        row[:] = -3.25
    elif kind == "masked":
        row[generator.random(vocab) < 0.99] = -np.inf
        row[vocab // 2] = 1.0
    elif kind == "extreme":
        row = np.where(generator.random(vocab) < 0.5, row * 1e30, row)
    return row.astype(np.float32)


@settings(max_examples=120)
@given(data=st.data())
def test_equals_the_sorting_oracle(sampler: Sampler, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 2, 7, 64, 65, 128, 129, 1000, 4097, 20000]))
    kind = data.draw(st.sampled_from(KINDS))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    s = SamplingParams(
        temperature=data.draw(st.sampled_from([0.05, 0.7, 1.0, 3.0])),
        top_k=data.draw(st.sampled_from([0, 1, 2, 50, 700, vocab - 1])),
        top_p=data.draw(st.sampled_from([1.0, 0.0001, 0.3, 0.5, 0.9, 0.999])),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0])),
    )
    rows = np.stack([make_row(kind, vocab, generator) for _ in range(4)])
    found = sampler.sample(torch.from_numpy(rows.copy()), [want(s, seed, [1, 2], 1) for seed in range(4)])
    noise = uniforms(list(range(4)), [1] * 4)
    for row, token, u in zip(rows, found, noise.tolist(), strict=True):
        assert token in may_be(row.astype(np.float64), s, u)


@pytest.mark.parametrize("logit", [0.0, -7.1, 31.3])
def test_equal_logits_share_exactly(sampler: Sampler, logit: float) -> None:
    """Half of 200 equal tokens are the 100 of lowest id, whatever the sums round to."""
    wants = [want(SamplingParams(top_p=0.5), seed, [1]) for seed in range(1500)]
    assert set(sampler.sample(torch.full((1500, 200), logit), wants)) == set(range(100))


def test_every_wish_changes_only_the_tokens_it_names(sampler: Sampler) -> None:
    """Greedy, so that the choice tells the adjusted order exactly."""
    base = torch.zeros(1, 300)
    base[0, [10, 20, 30, 40]] = torch.tensor([8.0, 7.0, 6.0, 5.0])

    def choose(tokens: list[int], generated: int = 0, **wishes: object) -> int | RopewayError:
        sampling = SamplingParams(temperature=0.0, **wishes)  # type: ignore[arg-type]
        return sampler.sample(base.clone(), [want(sampling, 0, tokens, generated)])[0]

    assert choose([10]) == 10
    assert choose([10], repetition_penalty=1.2) == 20
    assert choose([10, 20], 1, repetition_penalty=2.0) == 30
    assert choose([10, 20], 1, presence_penalty=3.0) == 10  # a prompt token is no output
    assert choose([1, 10], 1, presence_penalty=1.5) == 20
    assert choose([1, 10, 10, 20], 3, frequency_penalty=1.25) == 30
    assert choose([1], logit_bias={40: 4.0, 10: -100.0}) == 40
    assert choose([1], min_tokens=1, stop_token_ids=(10, 20)) == 30
    assert choose([1, 5], 1, min_tokens=1, stop_token_ids=(10, 20)) == 10
    assert isinstance(choose([1], logit_bias=dict.fromkeys(range(300), -math.inf)), RequestError)
    assert isinstance(choose([1], logit_bias={300: 1.0}), RopewayError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 127, 128, 998])
def test_a_bad_row_fails_alone(sampler: Sampler, bad: float, at: int) -> None:
    rows = torch.randn(8, 999, generator=torch.Generator().manual_seed(4))
    wishes = [SamplingParams(temperature=t, top_p=p) for t in (0.0, 1.0) for p in (1.0, 0.8)] * 2
    wants = [want(s, seed, [1]) for seed, s in enumerate(wishes)]
    clean = sampler.sample(rows.clone(), wants)
    for row in range(8):
        rows[row, at], kept = bad, float(rows[row, at])
        found = sampler.sample(rows.clone(), wants)
        assert [isinstance(token, NumericalError) for token in found] == [i == row for i in range(8)]
        assert [token for i, token in enumerate(found) if i != row] == [t for i, t in enumerate(clean) if i != row]
        rows[row, at] = kept


def test_a_banned_nan_is_still_an_error(sampler: Sampler) -> None:
    logits = torch.zeros(1, 100)
    logits[0, 2] = math.nan
    (found,) = sampler.sample(logits.clone(), [want(SamplingParams(min_tokens=3), 0, [1])])
    assert isinstance(found, NumericalError)
    masked = want(SamplingParams(), 0, [1])
    masked.seat.mask = bitmask([5], 100)
    (found,) = sampler.sample(logits, [masked])
    assert isinstance(found, NumericalError)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100, 1000, 4099])
def test_a_mask_bans_what_it_leaves_out_and_costs_no_other_row_anything(sampler: Sampler, vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    wishes = [SamplingParams(temperature=t, top_p=p, top_k=k) for t in (0.0, 1.0) for p in (1.0, 0.8) for k in (0, 3)]
    rows = torch.from_numpy(generator.normal(size=(len(wishes), vocab)).astype(np.float32)).mul(3)
    banned, masked, plain = rows.clone(), [], []
    for row, wish in enumerate(wishes):
        plain.append(want(wish, row, [1]))
        masked.append(want(wish, row, [1]))
        if row % 3:
            allowed = np.flatnonzero(generator.random(vocab) < generator.choice([0.02, 0.5, 1.0]))
            allowed = allowed if len(allowed) else np.array([vocab - 1])
            masked[-1].seat.mask = bitmask(allowed.tolist(), vocab)
            banned[row, np.setdiff1d(np.arange(vocab), allowed)] = -math.inf
    assert sampler.sample(rows.clone(), masked) == sampler.sample(banned, plain)
    clean = sampler.sample(rows.clone(), plain)
    plain[2].seat.mask, plain[4].seat.mask = bitmask([], vocab), np.zeros(vocab // 32 + 2, np.uint32)
    found = sampler.sample(rows.clone(), plain)
    assert isinstance(found[2], RequestError)
    assert isinstance(found[4], EngineError)
    assert [t for i, t in enumerate(found) if i not in (2, 4)] == [t for i, t in enumerate(clean) if i not in (2, 4)]


@settings(max_examples=60)
@given(data=st.data())
def test_log_probabilities_equal_the_sorting_oracle(sampler: Sampler, data: st.DataObject) -> None:
    """Ranks and ids exactly, ties included; values as closely as float32 logits tell."""
    vocab = data.draw(st.sampled_from([1, 7, 128, 129, 1000, 4097]))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    rows = np.stack([make_row(kind, vocab, generator) for kind in KINDS if kind != "extreme"])
    tokens = generator.integers(0, vocab, len(rows)).tolist()
    counts = [min(vocab, data.draw(st.sampled_from([0, 1, 5, 20]))) for _ in rows]
    found = sampler.logprobs(torch.from_numpy(rows), tokens, counts)
    for row, token, count, entry in zip(rows.astype(np.float64), tokens, counts, found, strict=True):
        assert not isinstance(entry, RopewayError)
        order = np.lexsort((np.arange(vocab), -row))
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert (entry.token, order[entry.rank - 1], entry.top_ids) == (token, token, order[:count].tolist())
        np.testing.assert_allclose([entry.logprob, *entry.top], logprobs[[token, *order[:count]]], atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_has_no_log_probabilities(sampler: Sampler, bad: float) -> None:
    rows = torch.zeros(3, 200)
    rows[1, 130] = bad
    assert [isinstance(entry, NumericalError) for entry in sampler.logprobs(rows, [0] * 3, [2] * 3)] == [0, 1, 0]
