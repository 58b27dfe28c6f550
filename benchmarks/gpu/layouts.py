"""What is measured: the shapes of well-known models, with random weights, and how much of everything."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway.bench.datasets import mixed_lengths

_COMMON = {"hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False}

LAYOUTS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "tiny-llama": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "tiny-qwen3": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Name to config.json. The embeddings and all dimensions are the published ones; no weight is."""


def write(name: str, directory: Path) -> Path:
    """A directory that holds the config.json of a layout, and nothing else."""
    place = directory / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(LAYOUTS[name], indent=1))
    return place


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `main` and `small` are layouts; lengths are in tokens, times in seconds."""

    main: str
    small: str
    context: int
    batches: tuple[int, ...]
    steps: int
    prefills: tuple[int, ...]
    prefill_tokens: int
    step_tokens: int
    seats: int
    offline: int
    compared: int
    static_batch: int
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    output_median: int
    online_seconds: float
    yardstick: int
    yardstick_lengths: tuple[int, int]
    gemm_rows: tuple[int, ...]
    tier_blocks: int
    buffer: int
    """Bytes to read and copy: more than any cache keeps."""
    blocks: int | None = None
    """Of the KV cache; None takes as many as a server would."""


FULL = Sizes(
    main="llama-3-8b", small="qwen3-0.6b", context=1024, batches=(1, 8, 64, 256), steps=64,
    prefills=(512, 2048, 8192), prefill_tokens=32768, step_tokens=8192, seats=256,
    offline=1000, compared=250, static_batch=64, prompts=(32, 1024), outputs=(32, 512), output_median=168,
    online_seconds=20.0, yardstick=256, yardstick_lengths=(100, 1024), gemm_rows=(1, 8, 16, 64, 256, 2048, 8192),
    tier_blocks=1024, buffer=8 << 30,
)  # fmt: skip
TINY = Sizes(
    main="tiny-llama", small="tiny-qwen3", context=32, batches=(1, 4), steps=4, prefills=(16, 64), prefill_tokens=128,
    step_tokens=64, seats=8, offline=12, compared=6, static_batch=3, prompts=(4, 32), outputs=(2, 12),
    output_median=5, online_seconds=0.2, yardstick=6, yardstick_lengths=(10, 32), gemm_rows=(1, 8),
    tier_blocks=32, buffer=1 << 20, blocks=200,
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request: its prompt, and how many tokens it gets whatever the model would like to end with."""

    prompt: list[int]
    output: int


def mix(sizes: Sizes, count: int, vocab: int, seed: int) -> list[Ask]:
    """`count` requests of mixed lengths, in the bounds of `sizes`. Token ids depend on `seed`, lengths
    do not."""
    rng = random.Random(seed)
    lengths = mixed_lengths(count, sizes.prompts, sizes.outputs, sizes.output_median)
    return [Ask(tokens(rng, n, vocab), m) for n, m in lengths]


def tokens(rng: random.Random, count: int, vocab: int) -> list[int]:
    """Random token ids; the first few ids are left out, they are often special."""
    return rng.choices(range(16, vocab), k=count)


def yardstick(sizes: Sizes, vocab: int) -> list[Ask]:
    """The requests that nano-vllm's bench.py makes (and after it mini-sglang's), draw for draw: random ids below
    10,000, lengths and outputs uniform, seed 0. In full that is 256 requests with 133,966 tokens of output."""
    rng = random.Random(0)
    low, high = sizes.yardstick_lengths
    prompts = [
        [rng.randint(0, min(10000, vocab - 1)) for _ in range(rng.randint(low, high))] for _ in range(sizes.yardstick)
    ]
    return [Ask(prompt, rng.randint(low, high)) for prompt in prompts]
