"""Quantized models through the whole engine: near what transformers computes in float32 with the same weights.

Activations are int8 in Ropeway, so logits differ by their rounding. The tolerances are shares of the logits' spread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints import prompt, reference
from quantized_checkpoints import LAYOUTS, save_quantized
from ropeway.config import EngineConfig
from ropeway.contract import Admit, Row, SamplingParams
from ropeway.runtime.gather import gather
from ropeway.runtime.local import LocalExecutor

Make = Callable[[str], Path]
ROUNDING = 0.02
"""Activations in int8, against the same weights in float32."""
WEIGHTS = {"int8": 0.03, "int4": 0.3}
"""Weights too, against the plain checkpoint: random weights have no slack, so int4 shows."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.06, tie_word_embeddings=False,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("plain")
    model = transformers.Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)
    return directory


def logits(directory: Path, tokens: list[int], **changes: object) -> torch.Tensor:
    """Of all positions, one token to a step."""
    values = {"dtype": "float32", "threads": 1, "num_kv_blocks": 8, "max_model_len": 128} | changes
    runner = LocalExecutor(EngineConfig(model=str(directory), **values)).runner  # type: ignore[arg-type]
    size = len(tokens)
    runner.slots.admit(Admit(0, 0, 0, tokens, size, 0, list(range(8)), SamplingParams(), ()), 0)
    found = []
    for start in range(size):
        row = Row(0, 0, 0, start, 1, True, [])
        runner.slots.extend(row)
        found.append(runner.model.forward(gather([row], runner.slots, runner.lane), runner.kv.data))
    return torch.cat(found)


def spread(found: torch.Tensor, directory: Path, tokens: list[int]) -> float:
    """Root mean square difference to transformers in float32, as a share of the logits' standard deviation."""
    with torch.no_grad():
        expected = reference(directory)(torch.tensor([tokens])).logits[0]
        return float((found - expected).pow(2).mean().sqrt() / expected.std())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored(plain: Path, tmp_path: Path, layout: str) -> None:
    directory = save_quantized(plain, layout, tmp_path / layout)
    tokens = prompt(3, 40)
    found = spread(logits(directory, tokens), directory / "plain", tokens)
    assert 0 < found < ROUNDING


@pytest.mark.parametrize("level", ["0", "1", "2", "3"])
@pytest.mark.parametrize("quantization", WEIGHTS)
def test_while_loading(plain: Path, quantization: str, level: str) -> None:
    tokens = prompt(4, 40)
    found = spread(logits(plain, tokens, quantization=quantization, kernel_level=level), plain, tokens)
    assert 0 < found < WEIGHTS[quantization]


@pytest.mark.parametrize("quantization", WEIGHTS)
def test_a_tied_embedding_is_read_from_the_packed_head(checkpoint: Make, quantization: str) -> None:
    tokens = prompt(5, 30)
    found = spread(
        logits(checkpoint("llama-tied"), tokens, quantization=quantization), checkpoint("llama-tied"), tokens
    )
    assert 0 < found < 2 * WEIGHTS[quantization]
