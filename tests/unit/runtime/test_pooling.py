"""Vectors in the making: which positions they need, and that chunks change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.contract import Row
from ropeway.errors import NumericalError
from ropeway.runtime.gather import last_of_each
from ropeway.runtime.pooling import Pool


@settings(max_examples=60)
@given(kind=st.sampled_from(["last", "mean", "cls"]), length=st.integers(1, 30), data=st.data())
def test_chunks_make_the_vector_of_the_whole(kind: str, length: int, data: st.DataObject) -> None:
    states = torch.randn(length, 5, generator=torch.Generator().manual_seed(length))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=4)) - {length})
    pool = Pool(kind, length)
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        row = Row(0, 0, 0, begin, end - begin, end == length, [])
        pool.take(states[begin:end][end - begin - pool.tail(row) :])
    whole = {"last": states[-1], "mean": states.double().mean(0).float(), "cls": states[0]}[kind]
    torch.testing.assert_close(pool.vector(), whole)


def test_a_vector_with_nan_is_a_fault_of_its_row() -> None:
    pool = Pool("last", 1)
    pool.take(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NumericalError):
        pool.vector()


@given(rows=st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1))
def test_the_last_positions_of_each_row(rows: list[tuple[int, int]]) -> None:
    ends = np.cumsum([count for count, _ in rows])
    wanted = [i for end, (_, tail) in zip(ends, rows, strict=True) for i in range(end - tail, end)]
    assert last_of_each(ends, np.array([tail for _, tail in rows])).tolist() == wanted
