"""Triton's attention in recorded steps: padded with rows that are nobody's, over tables that end in old ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import greedy, prompt
from driver import Driver
from pipelines import config_of, executor
from ropeway.runtime.attention.triton import TritonBackend

NUMBER = 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu records real graphs")
def test_recorded_steps_attend_as_others_do(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sequence is shorter than the first, so that its table is old beyond its own blocks."""
    monkeypatch.setattr(TritonBackend, "supports", classmethod(lambda cls, spec, device: None))
    directory = checkpoint("mistral-window")
    config = config_of(directory, attention_backend="triton", kernel_level="0", max_num_seqs=3)
    d = Driver(executor(config, "recorded"))
    assert d.executor.info.attention == "triton"
    lines = [d.add(prompt(length, length)) for length in (30, 9)]
    d.run(lines, 3)
    d.remove(lines.pop(0))
    d.run(lines, NUMBER)
    assert lines[0].output == greedy(directory, prompt(9, 9), NUMBER)
