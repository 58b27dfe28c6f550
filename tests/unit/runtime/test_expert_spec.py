"""Models with experts and with latent attention: what config.json says of them, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ropeway.errors import ModelError
from ropeway.modelspec import ModelSpec, load_spec

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32000,
    "sliding_window": None, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 40960, "rope_theta": 1e6, "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 163840,
    "rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
    "torch_dtype": "bfloat16",
}  # fmt: skip
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 61,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 163840,
    "rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "vocab_size": 129280,
    "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1,
}  # fmt: skip


def spec(directory: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return load_spec(directory, "m")


@pytest.mark.parametrize(
    ("config", "parameters", "active", "kv"),
    [
        (MIXTRAL, 46_702_792_704, 12_879_925_248, 2 * 32 * 8 * 128 * 2),
        (QWEN3_30B, 30_532_122_624, 3_353_032_704, 2 * 48 * 4 * 128 * 2),
        (V2_LITE, 15_706_484_224, 2_661_150_208, 27 * 576 * 2),
        (V3, 671_026_419_200, 37_552_297_472, 61 * 576 * 2),
    ],
    ids=["mixtral", "qwen3-30b", "v2-lite", "v3"],
)
def test_published_sizes(tmp_path: Path, config: dict[str, Any], parameters: int, active: int, kv: int) -> None:
    found = spec(tmp_path, config)
    assert found.implementation == "native"
    assert found.parameters == parameters
    assert found.active_parameters == active
    assert found.kv_bytes_per_token("bfloat16") == kv
    # Routers are held in float32.
    assert found.weight_bytes("bfloat16") == 2 * (parameters + found.routers)
    assert 0.5 < found.weight_bytes("bfloat16", "int8") / parameters / 2 < 0.52
    assert len(found.modules) == len(set(found.modules))


def test_published_attention(tmp_path: Path) -> None:
    v3 = spec(tmp_path, V3)
    assert (v3.kv_heads, v3.head_dim, v3.rotary_dim, v3.context_limit) == (1, 576, 64, 163840)
    # The mscale of YaRN enters queries and keys, so the scores twice.
    assert v3.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert v3.kv_bytes_per_token("bfloat16", "int8") == 61 * 580
    plain = spec(tmp_path, V3, rope_scaling=None)
    assert plain.scale == 192**-0.5
    assert spec(tmp_path, QWEN3_30B).scale == 128**-0.5
    assert spec(tmp_path, QWEN3_30B, use_sliding_window=True, sliding_window=64).windows == (64,) * 48


def test_which_layers_have_experts(tmp_path: Path) -> None:
    def sparse(config: dict[str, Any], **changes: Any) -> list[int]:
        found = spec(tmp_path, config, num_hidden_layers=6, **changes).experts
        assert found is not None
        return [layer for layer, here in enumerate(found.sparse) if here]

    assert sparse(MIXTRAL) == [0, 1, 2, 3, 4, 5]
    assert sparse(QWEN3_30B, decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(QWEN3_30B, mlp_only_layers=[0, 4]) == [1, 2, 3, 5]
    assert sparse(V3) == [3, 4, 5]


def test_a_missing_key_is_not_a_null(tmp_path: Path) -> None:
    """Families' own defaults hold for what is left out."""
    direct = spec(tmp_path, V2_LITE).latent
    assert direct is not None
    assert direct.q_rank == 0
    left_out = spec(tmp_path, {k: v for k, v in V2_LITE.items() if k != "q_lora_rank"}).latent
    assert left_out is not None
    assert left_out.q_rank == 1536


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MIXTRAL, {"num_experts_per_tok": 9}, "at most 8"),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts"),
        (MIXTRAL, {"mlp_bias": True}, "mlp_bias"),
        (QWEN3_30B, {"mlp_only_layers": "all"}, "list of layer numbers"),
        (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2_LITE, {"topk_method": "group_limited_greedy", "n_group": 7}, "divide the 64 experts"),
        (V2_LITE, {"attention_bias": True}, "q_lora_rank is null"),
        (V2_LITE, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_group": 9}, "at most n_group"),
        (V3, {"n_group": 64, "topk_group": 1}, "at most 4"),
        (V3, {"n_group": 256, "topk_group": 16}, "at least 2"),
        (V3, {"qk_rope_head_dim": 63}, "even"),
        (V3, {"first_k_dense_replace": -1}, "whole number"),
        (V3, {"n_shared_experts": "one"}, "whole number"),
    ],
)
def test_refused(tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec(tmp_path, config, **changes)
