"""Small random checkpoints with experts, and with attention to a latent, made by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import WINDOW

_SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_QWEN: dict[str, Any] = {**_SIZES, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3,
                         "moe_intermediate_size": 32}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_SIZES, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
         "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0}  # fmt: skip
_GROUPS = {"n_group": 4, "topk_group": 2}

EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "mixtral-window": (
        "Mixtral", {**_SIZES, "num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    ),
    "qwen3-moe": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-second": ("Qwen3Moe", {**_QWEN, "decoder_sparse_step": 2, "attention_bias": True}),
    "deepseek-v2": ("DeepseekV2", {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "rope_parameters": _YARN}),
    "deepseek-v3": ("DeepseekV3", {**_LATENT, **_GROUPS, "rope_parameters": _YARN, "n_shared_experts": 1}),
    "deepseek-v3-plain": (
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False},
    ),
    "deepseek-v3-biases": ("DeepseekV3", {**_LATENT, **_GROUPS, "attention_bias": True, "topk_group": 4}),
}  # fmt: skip
LATENT = [kind for kind in EXPERTS if kind.startswith("deepseek")]


def save_experts(kind: str, directory: Path) -> Path:
    """Write the checkpoint of `kind` to `directory`."""
    family, settings = EXPERTS[kind]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(sorted(EXPERTS).index(kind))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("score_correction_bias"):
                weight.uniform_(-0.3, 0.3)
            elif name.endswith(".bias"):
                weight.normal_(std=0.3)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def rewritten(source: Path, directory: Path, tensors: dict[str, Tensor]) -> Path:
    """The checkpoint `source` at `directory`, with other tensors."""
    directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)
    save_file(tensors, directory / "model.safetensors")
    return directory


def stacked(source: Path, directory: Path) -> Path:
    """The same model with the experts of each layer in two tensors, as transformers holds them while computing."""
    settings = json.loads((source / "config.json").read_text())
    count = settings.get("num_local_experts") or settings.get("num_experts") or settings["n_routed_experts"]
    tensors = load_file(source / "model.safetensors")
    one = next(name for name in tensors if ".experts.0." in name)
    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in one else ("gate_proj", "up_proj", "down_proj")

    def take(prefix: str, part: str) -> list[Tensor]:
        return [tensors.pop(f"{prefix}{e}.{part}.weight") for e in range(count)]

    prefixes = {name.split(".experts.")[0] + ".experts." for name in tensors if ".experts.0." in name}
    assert prefixes
    for prefix in prefixes:
        pairs = zip(take(prefix, gate), take(prefix, up), strict=True)
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}down_proj"] = torch.stack(take(prefix, down))
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    return rewritten(source, directory, renamed)
