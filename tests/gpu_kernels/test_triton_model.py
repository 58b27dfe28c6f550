"""Whole models on the kernels of this directory: what transformers computes, a prompt and single tokens after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import prompt, reference
from ropeway.config import EngineConfig
from ropeway.contract import Admit, Row, SamplingParams
from ropeway.runtime import local, quantization
from ropeway.runtime.gather import gather
from ropeway.runtime.kernels.triton.ops import TritonOps
from ropeway.runtime.layers import gpu, linear

Make = Callable[[str], Path]
TOKENS = 6


@pytest.fixture(autouse=True)
def _like_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a GPU would be given, on the CPU."""
    if device.type == "cuda":
        pytest.skip("tests/gpu serves whole models on the device itself")

    def choose(_: str, dtype: torch.dtype, scheme: linear.Scheme = "plain", level: int = 3) -> linear.Choice:
        ways = gpu.preferences(dtype, scheme, []) or {"torch": linear.TorchProduct}
        name, make = next(iter(ways.items()))
        return linear.Choice(name, make, make, ())

    monkeypatch.setattr(local, "select_ops", lambda *_: (TritonOps(), []))
    monkeypatch.setattr(linear, "choose", choose)
    monkeypatch.setattr(quantization, "lacks_fp8", lambda _: "")


def difference(directory: Path, **changes: object) -> float:
    """Root mean square difference of the last logits to transformers', as a share of their standard deviation."""
    tokens = prompt(2, TOKENS)
    values = {"dtype": "float32", "threads": 1, "num_kv_blocks": 8, "max_model_len": 64, "kernel_level": "1"} | changes
    runner = local.LocalExecutor(EngineConfig(model=str(directory), **values)).runner  # type: ignore[arg-type]
    runner.slots.admit(Admit(0, 0, 0, tokens, TOKENS, 0, [0], SamplingParams(), ()), 0)
    found: list[Tensor] = []
    for start, count in ((0, TOKENS - 2), (TOKENS - 2, 1), (TOKENS - 1, 1)):
        row = Row(0, 0, 0, start, count, True, [])
        runner.slots.extend(row)
        with torch.inference_mode():
            found.append(runner.model.forward(gather([row], runner.slots, runner.lane), runner.kv.data))
    with torch.no_grad():
        expected = reference(directory)(torch.tensor([tokens])).logits[0, -3:]
    return float((torch.cat(found) - expected).pow(2).mean().sqrt() / expected.std())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_small_operations(checkpoint: Make, kind: str) -> None:
    assert difference(checkpoint(kind)) < 1e-5


@pytest.mark.parametrize(("quantization", "allowed"), [("fp8", 0.3), ("int4", 0.6)])
def test_quantized_while_loading(checkpoint: Make, quantization: str, allowed: float) -> None:
    """Tests of the products say that they compute what they should; this one that a model has the right ones. Random
    weights have no slack, and e4m3 has three bits behind the point, for weights and for activations."""
    assert 0 < difference(checkpoint("llama-tied"), quantization=quantization, quantization_group=32) < allowed
