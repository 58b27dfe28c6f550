"""The families that Ropeway computes with its own code: Llama and those that vary it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropeway import checkpoint
from ropeway.errors import ModelError
from ropeway.modelspec.experts import EXPERTS
from ropeway.modelspec.files import CONFIG_LIMIT, Files
from ropeway.modelspec.latent import LATENT, further_layers, read_latent
from ropeway.modelspec.quantization import read_quantization
from ropeway.modelspec.reader import Reader
from ropeway.modelspec.spec import ModelSpec, RopeSpec

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_WIDENED = ".kv_b_proj."


def native_architecture(reader: Reader) -> str | None:
    """The name in `ARCHITECTURES` that config.json gives, or None."""
    named = reader.names("architectures")
    for name in named:
        if name in ARCHITECTURES:
            return name
    kind = str(reader.get("model_type", "unknown")).replace("_", "") + "forcausallm"
    return None if named else next((name for name in ARCHITECTURES if name.lower() == kind), None)


def read_native(files: Files, architecture: str, name: str) -> ModelSpec:
    """The spec of a model of one of `ARCHITECTURES`. Raises ModelError for what its native code does not compute."""
    reader, family = files.config, _FAMILIES[architecture]
    layers = reader.count("num_hidden_layers", high=4096)
    max_position = reader.count("max_position_embeddings", family.positions)
    if reader.get("hidden_act", "silu") != "silu":
        raise reader.wrong("hidden_act", "must be 'silu'")
    rope = _rope(reader, max_position, family.theta)
    qkv_bias, out_bias = family.biases(reader)
    mlp_bias = reader.flag("mlp_bias")
    if mlp_bias and architecture in EXPERTS:
        raise reader.wrong("mlp_bias", "must be false for a model with experts")
    return ModelSpec(
        **_common(files, name, architecture, layers),
        **_attention(reader, architecture, layers),
        architecture=architecture,
        layers=layers,
        hidden=reader.count("hidden_size"),
        intermediate=reader.count("intermediate_size"),
        vocab=reader.count("vocab_size"),
        norm_eps=reader.number("rms_norm_eps", family.eps),
        rope=rope,
        max_position=max_position,
        context_limit=_context_limit(files.directory, rope, max_position),
        tied=reader.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias and architecture == "LlamaForCausalLM",
        experts=EXPERTS[architecture](reader, layers) if architecture in EXPERTS else None,
    )


def _common(files: Files, name: str, architecture: str, layers: int) -> dict[str, Any]:
    """What all models have, counting the tensors that are used. The expansion of a latent is widened when it is loaded,
    so it counts as if it were stored plainly."""
    if architecture not in LATENT:
        return files.common(name)
    unused = further_layers(files.stored, layers)
    used = {key: info for key, info in files.stored.items() if key not in unused}
    kept = {key: info for key, info in used.items() if _WIDENED not in key}
    return replace(files, stored=used).common(name) | {"quantization": read_quantization(files.config, kept)}


def _attention(reader: Reader, architecture: str, layers: int) -> dict[str, Any]:
    """Heads and what they see."""
    family, heads = _FAMILIES[architecture], reader.count("num_attention_heads")
    if architecture in LATENT:
        latent = read_latent(reader)
        windows = (None,) * layers
        return {"heads": heads, "kv_heads": 1, "head_dim": latent.width, "windows": windows, "latent": latent}
    head_dim = reader.count("head_dim", family.head_dim or max(reader.count("hidden_size") // heads, 1))
    kv_heads = reader.count("num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise reader.wrong("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    if head_dim % 2 or head_dim < 4:
        raise reader.wrong("head_dim", "must be even and at least 4")
    return {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "windows": family.windows(reader, layers),
        "qk_norm": family.qk_norm,
    }  # fmt: skip


def _optional_biases(reader: Reader) -> tuple[bool, bool]:
    """Whether q, k, v and the output projection have biases, as the config says for both."""
    return reader.flag("attention_bias"), reader.flag("attention_bias")


def _no_biases(reader: Reader) -> tuple[bool, bool]:
    return False, False


def _biases_of_qkv(reader: Reader) -> tuple[bool, bool]:
    return True, False


def _no_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _mistral_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """One window for all layers; null is none, a missing key is Mistral's 4096."""
    if "sliding_window" in reader.config and reader.config["sliding_window"] is None:
        return (None,) * layers
    return (reader.count("sliding_window", 4096),) * layers


def _mixtral_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """One window for all layers, or none."""
    return (None if reader.get("sliding_window") is None else reader.count("sliding_window"),) * layers


def _qwen3_moe_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """One window for all layers, if `use_sliding_window`."""
    return (reader.count("sliding_window", 4096) if reader.flag("use_sliding_window") else None,) * layers


def _qwen_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """`use_sliding_window` turns windows on for `layer_types`, or else for layers from `max_window_layers` on."""
    if not reader.flag("use_sliding_window"):
        return (None,) * layers
    window = reader.count("sliding_window", 4096)
    types = reader.get("layer_types")
    if types is None:
        first = reader.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise reader.wrong("max_window_layers", "must be a whole number")
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise reader.wrong("layer_types", f"must name 'full_attention' or 'sliding_attention' for {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a family's code takes for granted where config.json is silent, and how it differs from Llama. `kv_heads` and
    `head_dim` None: as many as heads, and what they share of the hidden size."""

    positions: int
    theta: float = 10000.0
    eps: float = 1e-6
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    biases: Callable[[Reader], tuple[bool, bool]] = _optional_biases
    windows: Callable[[Reader, int], tuple[int | None, ...]] = _no_windows


_FAMILIES = {
    "LlamaForCausalLM": _Family(positions=2048),
    "MistralForCausalLM": _Family(positions=131072, kv_heads=8, biases=_no_biases, windows=_mistral_windows),
    "Qwen2ForCausalLM": _Family(positions=32768, biases=_biases_of_qkv, windows=_qwen_windows),
    "Qwen3ForCausalLM": _Family(positions=32768, head_dim=128, qk_norm=True, windows=_qwen_windows),
    "MixtralForCausalLM": _Family(
        positions=131072, theta=1e6, eps=1e-5, kv_heads=8, biases=_no_biases, windows=_mixtral_windows
    ),
    "Qwen3MoeForCausalLM": _Family(positions=32768, kv_heads=4, qk_norm=True, windows=_qwen3_moe_windows),
    "DeepseekV2ForCausalLM": _Family(positions=2048),
    "DeepseekV3ForCausalLM": _Family(positions=4096),
}
ARCHITECTURES = tuple(_FAMILIES)


def _rope(reader: Reader, max_position: int, theta: float) -> RopeSpec:
    """Both spellings: `rope_scaling` with `rope_theta` beside it, and `rope_parameters` with the theta inside."""
    key = "rope_scaling" if reader.get("rope_scaling") else "rope_parameters"
    given = reader.get(key, {})
    if not isinstance(given, dict):
        raise reader.wrong(key, "must be an object")
    nested = [v for v in given.values() if isinstance(v, dict)]
    if nested:
        if any(v != nested[0] for v in nested) or len(nested) != len(given):
            raise reader.wrong(key, "differs between layer types, which is not supported")
        given = nested[0]
    outer = reader.number("rope_theta", theta)
    inner = Reader(given, reader.path)
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"The rope type {kind!r} in {reader.path} is not supported. Supported: {', '.join(ROPE_KINDS)}."
        )
    for holder in (reader, inner):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.wrong("partial_rotary_factor", "must be 1: partial rotary embedding is not supported")
    key = "original_max_position_embeddings"
    original = reader.count(key, inner.get(key, max_position))
    factor = 1.0
    if kind == "yarn":
        factor = inner.number("factor", max_position / original)
    elif kind != "default":
        factor = inner.number("factor")
    if factor < 1:
        raise inner.wrong("factor", "must be at least 1")
    optional = {k: inner.number(k) for k in ("attention_factor", "mscale", "mscale_all_dim") if inner.get(k)}
    if kind == "llama3":
        optional["low_freq_factor"] = inner.number("low_freq_factor")
        optional["high_freq_factor"] = inner.number("high_freq_factor")
        if optional["high_freq_factor"] <= optional["low_freq_factor"]:
            raise inner.wrong("high_freq_factor", "must be above low_freq_factor")
    return RopeSpec(
        kind=kind,
        theta=inner.number("rope_theta", outer),
        factor=factor,
        original_max=original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=bool(inner.get("truncate", True)),
        **optional,
    )


def _context_limit(directory: Path, rope: RopeSpec, max_position: int) -> int:
    """`max_position_embeddings` includes the scaling of llama3 checkpoints but not that of linear and dynamic ones,
    and yarn checkpoints come either way. Where it is unclear, the tokenizer's `model_max_length` is an upper bound."""
    if rope.kind == "yarn":
        return max(max_position, int(rope.original_max * rope.factor))
    if rope.kind not in ("linear", "dynamic"):
        return max_position
    limit = int(max_position * rope.factor)
    if (directory / "tokenizer_config.json").is_file():
        stated = checkpoint.read_json(directory / "tokenizer_config.json", limit=CONFIG_LIMIT).get("model_max_length")
        if type(stated) is int and max_position <= stated < limit:
            limit = stated
    return limit
