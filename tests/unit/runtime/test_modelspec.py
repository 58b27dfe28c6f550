"""What is read from config.json, in every spelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import KINDS, WINDOW
from ropeway.errors import ModelError
from ropeway.modelspec import ModelSpec, load_spec

Make = Callable[[str], Path]
BASE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip


def spec(directory: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    config = {k: v for k, v in {**BASE, **changes}.items() if v != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_spec(directory, "m")


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_formula_equal_those_stored(checkpoint: Make, kind: str) -> None:
    found = load_spec(checkpoint(kind))
    assert found.parameters == found.stored_parameters
    assert found.weight_bytes("bfloat16") == 2 * found.parameters


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 64}},
        ),
        (
            {"rope_scaling": None, "rope_theta": 10000},
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        ),
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert spec(tmp_path, **old) == spec(tmp_path, **new)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 256),
        ({"rope_type": "linear", "factor": 2.5}, 640),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 32}, 256),
    ],
)  # fmt: skip
def test_context_limit(tmp_path: Path, rope: dict[str, Any] | None, limit: int) -> None:
    assert spec(tmp_path, rope_scaling=rope).context_limit == limit


def test_the_tokenizer_bounds_an_unclear_context_limit(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert spec(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0}).context_limit == 512
    assert spec(tmp_path).context_limit == 256
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert spec(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0}).context_limit == 1024


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, (8,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
             "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
             "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
            (8, None, None, 8),
        ),
    ],
)  # fmt: skip
def test_windows(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec(tmp_path, **changes).windows == windows


SLIDING = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}


@pytest.mark.parametrize(("changes", "message"), [
    (SLIDING | {"max_window_layers": -1}, "max_window_layers .*must be a whole number"),
    (SLIDING | {"max_window_layers": "3"}, "max_window_layers .*must be a whole number"),
    (SLIDING | {"layer_types": ["full_attention"]}, "layer_types .*for 4 layers"),
    (SLIDING | {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types .*for 4 layers"),
    ({"rope_scaling": [2.0]}, "rope_scaling .*must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}},
     "rope_parameters .*differs between layer types"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "rope_theta": 1e4}}, "differs between layer types"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor .*must be at least 1"),
    ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 512}}, "factor .*at least 1"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
     "high_freq_factor .*must be above low_freq_factor"),
    ({"quantization_config": "int8"}, "quantization_config .*must be an object"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups .*at least one group"),
])  # fmt: skip
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec(tmp_path, **changes)


def test_without_a_dtype_in_words_it_is_that_of_most_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 4, dtype=torch.float16), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert spec(tmp_path, torch_dtype="absent").dtype == "float16"
    assert spec(tmp_path, torch_dtype="float32").dtype == "float32"


def test_windows_of_saved_checkpoints(checkpoint: Make) -> None:
    assert load_spec(checkpoint("qwen2-window")).windows == (None, WINDOW, WINDOW)
    assert load_spec(checkpoint("mistral-window")).windows == (WINDOW,) * 3


def test_end_tokens_and_generation_defaults(tmp_path: Path) -> None:
    found = spec(tmp_path, {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "transformers_version": "5"})
    assert found.eos_ids == (7, 9, 2)
    assert found.generation == {"temperature": 0.6, "top_k": 20}


def test_costs(tmp_path: Path) -> None:
    found = spec(tmp_path)
    assert found.kv_bytes_per_token("float32") == 2 * 4 * 2 * 16 * 4
    assert found.dtype == "bfloat16"
    assert replace(found, tied=True).parameters == found.parameters - 300 * 64
    assert spec(tmp_path, torch_dtype="absent", dtype="float16").dtype == "float16"
    assert spec(tmp_path, torch_dtype="absent").dtype == "float32"


def test_architecture_by_model_type(tmp_path: Path) -> None:
    assert spec(tmp_path, architectures="absent", model_type="qwen3").architecture == "Qwen3ForCausalLM"
