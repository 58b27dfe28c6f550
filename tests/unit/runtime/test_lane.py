"""Arrays on their way to a device and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropeway.runtime.lane import CpuLane, lane_for, layout, pack, unpack

TYPES = [np.int32, np.int64, np.float32, np.float64]
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(TYPES), SHAPES), max_size=6), st.integers(0, 2**32 - 1))
def test_one_buffer_holds_them_all(kinds: list[tuple[type[np.generic], tuple[int, ...]]], seed: int) -> None:
    """As a transfer to a GPU packs and unpacks them: whatever their types and shapes, and from any strides."""
    random = np.random.default_rng(seed)
    arrays = [random.integers(-9, 9, shape).astype(kind) for kind, shape in kinds]
    strided = [np.asfortranarray(array) for array in arrays]
    places, size = layout(strided)
    buffer = torch.full((size,), 255, dtype=torch.uint8)
    pack(strided, places, buffer)
    for array, place, tensor in zip(arrays, places, unpack(arrays, places, buffer), strict=True):
        assert place % array.itemsize == 0
        assert tensor.is_contiguous()
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)


def test_what_is_fetched_is_what_was_there_then() -> None:
    lane = CpuLane()
    tensor = torch.arange(4)
    fetch = lane.fetch(tensor)
    tensor.zero_()
    assert fetch.wait().tolist() == [0, 1, 2, 3]


def test_marks_tell_the_time() -> None:
    lane = CpuLane()
    first, second = lane.mark(), lane.mark()
    assert lane.seconds(first, second) >= 0
    assert lane.seconds(first, first) == 0


def test_a_recorded_step_is_run_once_and_then_whenever_it_is_asked_for() -> None:
    lane = CpuLane()
    total = torch.zeros(1)

    def step() -> None:
        total.add_(1)

    replay = lane.capture(step)
    assert total == 1
    replay()
    replay()
    assert total == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    lane = lane_for(torch.device("cuda", torch.cuda.current_device()))
    first = lane.mark()
    numbers, table = lane.stage(np.arange(5), np.ones((2, 3), np.int32))
    assert numbers.device.type == "cuda"
    fetch = lane.fetch(numbers * 2)
    numbers.zero_()
    assert fetch.wait().tolist() == [0, 2, 4, 6, 8]
    assert lane.fetch(table).wait().tolist() == [[1, 1, 1], [1, 1, 1]]

    def step() -> None:
        numbers.add_(1)

    lane.capture(step)()
    assert lane.fetch(numbers).wait().tolist() == [2] * 5
    assert lane.seconds(first, lane.mark()) > 0
