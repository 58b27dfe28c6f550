"""What is read of families without native code, in the names that they give to things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ropeway.errors import ModelError
from ropeway.modelspec import GenericSpec, ModelSpec, load_spec

PLAIN: dict[str, Any] = {
    "architectures": ["SomethingNewForCausalLM"], "model_type": "something_new", "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 256, "dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip


def spec(directory: Path, implementation: str = "auto", **config: Any) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(config))
    return load_spec(directory, "m", implementation)


def shape(found: ModelSpec) -> tuple[int, ...]:
    assert isinstance(found, GenericSpec)
    return (found.layers, found.hidden, found.heads, found.kv_heads, found.head_dim, found.vocab, found.context_limit)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, (4, 64, 8, 2, 8, 300, 256)),
        ({**PLAIN, "head_dim": 24}, (4, 64, 8, 2, 24, 300, 256)),
        (
            {"architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 128,
             "n_ctx": 64, "vocab_size": 99},
            (3, 48, 4, 4, 12, 99, 128),
        ),
        (
            {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_layer": 3, "n_embd": 48,
             "n_head": 4, "n_positions": 128, "vocab_size": 99},
            (3, 48, 4, 1, 12, 99, 128),
        ),
        (
            {"architectures": ["DbrxForCausalLM"], "n_layers": 3, "d_model": 48, "n_heads": 4, "max_seq_len": 512,
             "vocab_size": 99, "attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 80}},
            (3, 48, 4, 2, 12, 99, 512),
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
             "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                             "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
            (34, 2560, 8, 4, 256, 262208, 131072),
        ),
    ],
)  # fmt: skip
def test_names_of_a_shape(tmp_path: Path, config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert shape(spec(tmp_path, **config)) == expected


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, 512),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64),
    ],
)
def test_context_ends_where_neighbours_would_matter(tmp_path: Path, changes: dict[str, Any], limit: int) -> None:
    assert spec(tmp_path, **{**PLAIN, **changes}).context_limit == limit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None}, "none of num_attention_heads, n_head.*add num_attention_heads"),
        ({"max_position_embeddings": None}, "none of max_position_embeddings, n_positions"),
        ({"num_key_value_heads": 3}, "8 attention heads and 3 KV heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* from 1 to 4096"),
        ({"is_encoder_decoder": True}, "an encoder beside its decoder"),
        ({"alibi": True}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"ssm_cfg": {}}, "a state of their own .*ssm_cfg"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"architectures": ["SomethingNewForSequenceClassification"]}, "generates no text"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}, "for the native families"),
        ({"rope_scaling": 2.0}, "rope_scaling .*must be an object"),
        ({"quantization_config": {"quant_method": "fp6"}}, "quant_method 'fp6', which cannot be loaded"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec(tmp_path, **{**PLAIN, **changes})


def test_whose_code(tmp_path: Path) -> None:
    llama = {**PLAIN, "architectures": ["LlamaForCausalLM"]}
    assert spec(tmp_path, **llama).implementation == "native"
    assert spec(tmp_path, "transformers", **llama).implementation == "transformers"
    with pytest.raises(ModelError, match=r"no native code for SomethingNewForCausalLM.*--model-impl auto"):
        spec(tmp_path, "native", **PLAIN)


def test_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    spec(tmp_path, **PLAIN)
    code = (
        "import sys; from pathlib import Path; from ropeway.modelspec import load_spec; "
        "load_spec(Path(sys.argv[1])); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_size_without_weights(tmp_path: Path) -> None:
    """By the index if there is one, else as if it were a gated decoder, all experts counted."""
    dense = spec(tmp_path, **PLAIN)
    assert dense.parameters == 4 * (2 * 10 * 8 * 64 + 3 * 64 * 112) + 2 * 300 * 64
    mixture = spec(tmp_path, **PLAIN, num_local_experts=8, moe_intermediate_size=56)
    assert mixture.parameters - dense.parameters == 4 * 3 * 64 * (8 * 56 - 112)
    assert dense.weight_bytes("bfloat16", "int8") < dense.weight_bytes("bfloat16") == 2 * dense.parameters
    index = {"metadata": {"total_size": 2 * 12345}, "weight_map": {"a": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert spec(tmp_path, **PLAIN).parameters == 12345
