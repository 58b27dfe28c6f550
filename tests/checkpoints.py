"""Small random checkpoints of the native families, made by transformers, and what transformers computes with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 300
WINDOW = 16
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide weights make the attention pattern and the positions matter, so that a mistake in them changes tokens.
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 32}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
         "max_position_embeddings": 64},
    ),
    "yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "yarn-mscale": (
        "Llama",
        {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0, "truncate": False}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-sharded": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}  # fmt: skip


def save(kind: str, directory: Path) -> Path:
    """Write the checkpoint of `kind` to `directory`."""
    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **changes})
    torch.manual_seed(sorted(KINDS).index(kind))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_(std=0.3)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size="120KB" if kind.endswith("sharded") else "5GB")
    return directory


@cache
def reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def greedy(directory: Path, prompt: list[int], number: int) -> list[int]:
    """`number` tokens after `prompt`, by transformers in float32, with its own cache."""
    model = reference(directory)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=number, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()
