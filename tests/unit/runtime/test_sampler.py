"""The sampler: distributions, determinism, and independence of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from ropeway.contract import SamplingParams
from ropeway.errors import EngineError, NumericalError, RequestError, RopewayError
from ropeway.runtime.kernels.library import load
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.noise import derive, uniforms
from ropeway.runtime.sampler import Sampler, Want
from ropeway.runtime.slots import Slot


def want(sampling: SamplingParams, seed: int = 0, generated: int = 0, tokens: Sequence[int] = (1,)) -> Want:
    known = np.array([*tokens, *[0] * generated], dtype=np.int32)
    seat = Slot(0, 0, len(tokens), len(known), 1, sampling, (2,), seed)
    return Want(seat, known)


Sample = Callable[[torch.Tensor, Sequence[Want]], list[int | RopewayError]]


@pytest.fixture(params=["torch", "native"])
def sample(request: pytest.FixtureRequest) -> Sample:
    if request.param == "torch":
        return lambda logits, wants: Sampler(TorchOps()).sample(logits.clone(), wants)
    library = load()
    if isinstance(library, str):
        pytest.skip(library)
    return lambda logits, wants: Sampler(TorchOps(), library).sample(logits.clone(), wants)


def oracle(logits: np.ndarray, s: SamplingParams) -> np.ndarray:
    """The probabilities of each token by the definitions, in float64, on a fully sorted vocabulary."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    p = np.exp((logits[order] - logits.max()) / s.temperature)
    p[p < s.min_p * p[0]] = 0
    if s.top_k > 0:
        p[s.top_k :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= s.top_p] = 0
    result = np.empty_like(p)
    result[order] = p / p.sum()
    return result


def chi_square_fits(counts: np.ndarray, p: np.ndarray) -> bool:
    """Pearson's test at about five standard deviations of the statistic; impossible tokens must not occur."""
    number = counts.sum()
    if counts[p == 0].any():
        return False
    expected = number * p[p > 0]
    assert expected.min() >= 5, "too few draws for the test"
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    return bool(statistic <= degrees + 5 * math.sqrt(2 * degrees))


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.8, "min_p": 0.15},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.5},
]


@pytest.mark.parametrize("params", CASES)
def test_distribution(sample: Sample, params: dict[str, float]) -> None:
    sampling = SamplingParams(**params)
    row = torch.randn(16, generator=torch.Generator().manual_seed(3)).mul(1.2)
    number = 7000
    drawn = sample(row.repeat(number, 1), [want(sampling, seed=11, generated=i) for i in range(number)])
    p = oracle(row.double().numpy(), sampling)
    assert chi_square_fits(np.bincount(drawn, minlength=16), p)


def test_the_chi_square_test_can_fail() -> None:
    p = np.array([0.25, 0.25, 0.25, 0.25])
    assert chi_square_fits(np.array([2010, 1990, 2030, 1970]), p)
    assert not chi_square_fits(np.array([2300, 1900, 1900, 1900]), p)
    assert not chi_square_fits(np.array([4000, 4000, 1, 0]), np.array([0.5, 0.5, 0.0, 0.0]))


def exact(row: np.ndarray, s: SamplingParams, u: float) -> int:
    """Inverse CDF in the order of token ids."""
    return int(np.searchsorted(np.cumsum(oracle(row, s)), u, side="right"))


@pytest.mark.parametrize(
    "params",
    [
        *CASES,
        {"temperature": 5.0, "top_p": 0.97},
        {"temperature": 3.0, "min_p": 0.001},
        {"temperature": 9.0, "top_k": 900},
        {"temperature": 4.0, "top_k": 2000, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 4999, "top_p": 0.999, "min_p": 1e-4},
        {"temperature": 0.01, "top_p": 0.5},
    ],
)
def test_equals_the_definition_on_a_large_vocabulary(sample: Sample, params: dict[str, float]) -> None:
    """Peaked and flat distributions, narrow and wide nuclei, small and large top_k."""
    sampling = SamplingParams(**params)
    rows = torch.randn(40, 5000, generator=torch.Generator().manual_seed(5)).mul(2)
    found = sample(rows, [want(sampling, seed=i, generated=i) for i in range(40)])
    noise = uniforms(list(range(40)), list(range(40)))
    assert found == [exact(r, sampling, u) for r, u in zip(rows.double().numpy(), noise.tolist(), strict=True)]


@pytest.mark.parametrize("top_k", [3, 70])
def test_ties_go_to_the_lowest_ids(sample: Sample, top_k: int) -> None:
    """With bfloat16 weights many logits are equal; which of them are candidates must not depend on chance."""
    row = torch.zeros(1000)
    row[torch.arange(999, 0, -7)] = 1.0
    ties = sorted(range(999, 0, -7))[:top_k]
    drawn = sample(row.repeat(2000, 1), [want(SamplingParams(top_k=top_k), seed=i) for i in range(2000)])
    assert set(drawn) == set(ties)
    assert sample(row[None], [want(SamplingParams(temperature=0.0))]) == [min(ties)]


def test_a_row_does_not_depend_on_its_neighbours(sample: Sample) -> None:
    rows = torch.randn(len(CASES) * 3, 3000, generator=torch.Generator().manual_seed(9)).mul(3)
    wants = [
        want(SamplingParams(**CASES[i % len(CASES)], presence_penalty=0.5 * (i % 3)), seed=i, generated=i)
        for i in range(len(rows))
    ]
    together = sample(rows, wants)
    assert together == [sample(rows[i : i + 1], wants[i : i + 1])[0] for i in range(len(rows))]
    order = list(reversed(range(len(rows))))
    assert [together[i] for i in order] == sample(rows[order], [wants[i] for i in order])


def test_temperature_near_zero_is_greedy(sample: Sample) -> None:
    row = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(row, [want(SamplingParams(temperature=1e-7))]) == [1]


def test_bad_logits_fail_their_row_alone(sample: Sample) -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    clean = sample(rows, [want(SamplingParams(temperature=t % 2), seed=t) for t in range(6)])
    rows[1, 7] = torch.nan
    rows[4, 0] = torch.inf
    found = sample(rows, [want(SamplingParams(temperature=t % 2), seed=t) for t in range(6)])
    for i, token in enumerate(found):
        assert isinstance(token, NumericalError) if i in (1, 4) else token == clean[i]


def test_nothing_left_is_an_error(sample: Sample) -> None:
    params = SamplingParams(temperature=0.0, logit_bias={0: -math.inf, 1: -math.inf}, min_tokens=1)
    (found,) = sample(torch.zeros(1, 3), [want(params)])
    assert isinstance(found, RequestError)


def test_an_exception_in_one_row_fails_that_row_alone(sample: Sample) -> None:
    good = SamplingParams(top_k=4)
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found = sample(rows, [want(good, 1), want(good, 2), want(SamplingParams(logit_bias={99: 1.0}), 3)])
    assert isinstance(found[2], RopewayError)
    assert found[2].code == "RW-REQ"
    assert found[:2] == sample(rows[:2], [want(good, 1), want(good, 2)])

    wants = [want(good, 1), want(good, 2), want(good, 3)]
    object.__setattr__(wants[1].seat, "seed", "no number")
    found = sample(rows, wants)
    assert isinstance(found[1], EngineError)
    assert [found[0], found[2]] == sample(rows[[0, 2]], [want(good, 1), want(good, 3)])


class Guided:
    """A guide that allows token 2, and cannot say what the first of its rows may write."""

    def prepare(self, grammar: str) -> None: ...

    def begin(self, wants: Sequence[Want]) -> None: ...

    def masks(self, wants: Sequence[Want]) -> list[np.ndarray | RopewayError | None]:
        return [EngineError("no mask"), *[np.array([0b100], np.uint32)] * (len(wants) - 1)]


def test_a_row_without_a_mask_fails_alone() -> None:
    logits, grammar = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 4), SamplingParams(temperature=0.0, grammar="g")
    free = SamplingParams(temperature=0.0)
    wants = [want(free), want(grammar), want(grammar), want(free)]
    assert [str(row) for row in Sampler(TorchOps(), guide=Guided()).sample(logits.clone(), wants)] == [
        "1", "no mask", "2", "1",
    ]  # fmt: skip
    above, first, second, below = Sampler(TorchOps()).sample(logits.clone(), wants)
    assert (above, below) == (1, 1)
    for refused in (first, second):
        assert isinstance(refused, RequestError)
        assert refused.param == "grammar"


def test_noise_is_uniform_and_depends_on_seed_and_index_alone() -> None:
    number = 40000
    by_index = uniforms([7] * number, list(range(number)))
    by_seed = uniforms(list(range(number)), [7] * number)
    diagonal = uniforms(list(range(number)), list(range(number)))
    for noise in (by_index, by_seed, diagonal):
        assert (noise >= 0).all()
        assert (noise < 1).all()
        assert chi_square_fits(np.bincount((noise * 64).astype(int), minlength=64), np.full(64, 1 / 64))
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(by_index, by_seed)[0, 1]) < 0.02
    assert len(np.unique(by_index)) == number
    assert uniforms([7], [123])[0] == by_index[123]
    assert uniforms([-1], [0])[0] == uniforms([(1 << 64) - 1], [0])[0]


def test_derived_seeds_differ() -> None:
    assert len({derive(seed, rid) for seed in range(50) for rid in range(50)}) == 2500
