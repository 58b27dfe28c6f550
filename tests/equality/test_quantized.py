"""Quantized models through the whole engine: near what transformers computes in float32 with the same weights.

Activations are int8 in Ropeway, so logits differ by their rounding. The tolerances are shares of the logits' spread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from many_ways import ROUNDING, WEIGHTS, logits, spread

from checkpoints import prompt
from native import skip_unless_there_is
from quantized_checkpoints import LAYOUTS, save_quantized

Make = Callable[[str], Path]


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored(plain: Path, tmp_path: Path, layout: str) -> None:
    directory = save_quantized(plain, layout, tmp_path / layout)
    tokens = prompt(3, 40)
    found = spread(logits(directory, tokens), directory / "plain", tokens)
    assert 0 < found < ROUNDING


@pytest.mark.parametrize("level", ["0", "1", "2", "3"])
@pytest.mark.parametrize("quantization", WEIGHTS)
def test_while_loading(plain: Path, quantization: str, level: str) -> None:
    skip_unless_there_is(level)
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
