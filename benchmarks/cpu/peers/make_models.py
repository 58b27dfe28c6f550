"""Checkpoints with random weights in Hugging Face's layout: speed does not depend on what the weights say.

    python benchmarks/cpu/peers/make_models.py OUT [S M Q] [--w8a8]

S has the shape of SmolLM2-360M, M of TinyLlama-1.1B and Q of Qwen3-0.6B; weights are bfloat16 from one seed. The
tokenizer is trained on Python's own standard library, so that engines have real text to decode. `--w8a8` also writes
each model as compressed-tensors int8 (weights per output channel, activations per token), in OUT/NAME-w8a8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]

LLAMA: Config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}
QWEN3: Config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
    }


SHAPES: dict[str, Config] = {
    "S": {**LLAMA, **_shape(960, 2560, 32, 15, 5, 64, 49152), "tie_word_embeddings": True, "rope_theta": 1e5},
    "M": {**LLAMA, **_shape(2048, 5632, 22, 32, 4, 64, 32000), "tie_word_embeddings": False, "rope_theta": 1e4},
    "Q": {**QWEN3, **_shape(1024, 3072, 28, 16, 8, 128, 151936), "tie_word_embeddings": True, "rope_theta": 1e6},
}
COMMON: Config = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
END = "<|endoftext|>"
# About as many tokens as this much text can teach; the rest of a larger vocabulary is filled up.
LEARNED = 49152


def weights(config: Config, generator: torch.Generator) -> Weights:
    """All parameters of a Llama or Qwen3 layout: matrices normal with deviation 0.02, norms one."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, 0.02, generator=generator).bfloat16()

    found = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}{norm}.weight"] = torch.ones(hidden).bfloat16()
        if config["model_type"] == "qwen3":
            for norm in ("q_norm", "k_norm"):
                found[f"{name}self_attn.{norm}.weight"] = torch.ones(config["head_dim"]).bfloat16()
        for module, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            found[f"{name}{module}.weight"] = matrix(rows, columns)
    return found


def _texts() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` tokens; what training does not fill is made of numbered words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab, LEARNED), special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_texts(), trainer)
    # Entries without merges: never encoded, but decoded like any other.
    fields = json.loads(made.to_str())
    known = fields["model"]["vocab"]
    known.update({f"Ġword{number}": number for number in range(len(known), vocab)})
    return Tokenizer.from_str(json.dumps(fields))


def quantize_w8a8(found: Weights) -> Weights:
    """Every projection as int8 with one scale for each output channel (symmetric, the largest value becomes 127)."""
    result: Weights = {}
    for name, weight in found.items():
        if not name.endswith("_proj.weight"):
            result[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        result[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        result[f"{name}_scale"] = scale.bfloat16()
    return result


# https://github.com/vllm-project/compressed-tensors: the fields of a scheme
W8A8: Config = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def _write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def make(out: Path, name: str, *, w8a8: bool) -> None:
    config = {**SHAPES[name], **COMMON}
    plain = out / name
    if not (plain / "model.safetensors").exists():
        plain.mkdir(parents=True, exist_ok=True)
        made = tokenizer(config["vocab_size"])
        made.save(str(plain / "tokenizer.json"))
        _write_json(plain / "config.json", config)
        _write_json(
            plain / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END, "pad_token": END},
        )
        _write_json(plain / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
        found = weights(config, torch.Generator().manual_seed(0))
        save_file(found, plain / "model.safetensors", metadata={"format": "pt"})
        print(f"{plain}: {sum(w.numel() for w in found.values()) / 1e6:.0f} M parameters", flush=True)
    quantized = out / f"{name}-w8a8"
    if w8a8 and not (quantized / "model.safetensors").exists():
        quantized.mkdir(parents=True, exist_ok=True)
        for file in plain.glob("*.json"):
            shutil.copy(file, quantized)
        _write_json(quantized / "config.json", {**config, "quantization_config": W8A8})
        found = quantize_w8a8(load_file(plain / "model.safetensors"))
        save_file(found, quantized / "model.safetensors", metadata={"format": "pt"})
        print(f"{quantized}: int8", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--w8a8", action="store_true")
    options = parser.parse_args()
    for name in options.names:
        make(options.out, name, w8a8=options.w8a8)


if __name__ == "__main__":
    main()
