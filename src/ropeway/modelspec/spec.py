"""A model's shape, limits and costs, read from `config.json` without torch and without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropeway import checkpoint
from ropeway.errors import ModelError
from ropeway.modelspec.quantization import QuantSpec, matrix_bytes, packed_bytes, read_quantization, stored_parameters
from ropeway.modelspec.reader import Reader

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")
_CONFIG_LIMIT = 8 * 1024 * 1024
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: its kind and the parameters that the kind uses; lengths in tokens."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is known of a model before its weights are read.

    `windows[l]` is layer l's sliding window in tokens or None. `context_limit` is the longest sequence that the model
    is made for, rope scaling included. `dtype` is the checkpoint's. `eos_ids` joins config and generation config.
    `generation` are the checkpoint's own sampling defaults, `stored_parameters` the count by the safetensors headers
    (None without weights). `quantization` says how the checkpoint's linear layers are stored, None if plainly.
    """

    name: str
    directory: Path
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope: RopeSpec
    max_position: int
    context_limit: int
    dtype: str
    windows: tuple[int | None, ...]
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    stored_parameters: int | None = None
    quantization: QuantSpec | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters by formula; tied embeddings count once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        small = (q + 2 * kv) * self.qkv_bias + self.hidden * self.out_bias + 2 * self.head_dim * self.qk_norm
        small += (2 * self.intermediate + self.hidden) * self.mlp_bias + 2 * self.hidden
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return sum(outs * ins for outs, ins in self.linears) + self.layers * small + embeddings + self.hidden

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every weight matrix of the layers, the embeddings not among them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = [(q + 2 * kv, self.hidden), (self.hidden, q)]
        layer += [(2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)]
        return layer * self.layers

    def weight_bytes(self, dtype: str, quantization: str = "auto", group: int = 64) -> int:
        """Bytes of the loaded weights. `quantization` and `group` as in `EngineConfig`: 'auto' is as stored, 'int8' and
        'int4' quantize every linear layer to that format and the LM head to int8."""
        size = DTYPE_BYTES[dtype]
        stored = self.quantization
        if stored is None and quantization == "auto":
            return self.parameters * size
        if stored is not None:
            group = stored.group or 128
            if quantization == "auto" and stored.weights is not None and stored.scales is not None:
                plain = (self.parameters - stored.weights) * size
                return plain + packed_bytes(stored.format, stored.weights, stored.scales)
        format = stored.format if stored is not None else quantization
        total = self.parameters * size
        for outs, ins in self.linears:
            total += matrix_bytes(format, outs, ins, group) - outs * ins * size
        if quantization != "auto":
            total += matrix_bytes("int8", self.vocab, self.hidden, 0) - self.vocab * self.hidden * size
        return total

    def kv_bytes_per_token(self, dtype: str, kv_cache_dtype: str = "auto") -> int:
        """K and V of all layers for one token. int8 has a float32 scale for each KV head's K, and one for its V."""
        vector = self.head_dim + 4 if kv_cache_dtype == "int8" else self.head_dim * DTYPE_BYTES[dtype]
        return 2 * self.layers * self.kv_heads * vector


def load_spec(directory: Path, name: str | None = None) -> ModelSpec:
    """The spec of the model in `directory`. Raises ModelError if it is damaged or of an unsupported kind."""
    config = checkpoint.read_json(directory / "config.json", limit=_CONFIG_LIMIT)
    generation: dict[str, Any] = {}
    if (directory / "generation_config.json").is_file():
        generation = checkpoint.read_json(directory / "generation_config.json", limit=_CONFIG_LIMIT)
    stored = checkpoint.tensors(directory) if checkpoint.has_weights(directory) else {}
    reader = Reader(config, directory / "config.json")
    architecture = _architecture(reader)
    heads = reader.count("num_attention_heads")
    hidden = reader.count("hidden_size")
    layers = reader.count("num_hidden_layers", high=4096)
    max_position = reader.count("max_position_embeddings", _DEFAULT_POSITIONS[architecture])
    head_dim = reader.count("head_dim", 128 if architecture == "Qwen3ForCausalLM" else max(hidden // heads, 1))
    kv_default = 8 if architecture == "MistralForCausalLM" else heads
    kv_heads = reader.count("num_key_value_heads", kv_default)
    if heads % kv_heads:
        raise reader.wrong("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    if head_dim % 2 or head_dim < 4:
        raise reader.wrong("head_dim", "must be even and at least 4")
    if reader.get("hidden_act", "silu") != "silu":
        raise reader.wrong("hidden_act", "must be 'silu'")
    rope = _rope(reader, max_position)
    qkv_bias, out_bias = _biases(architecture, reader)
    return ModelSpec(
        name=name or directory.resolve().name,
        directory=directory,
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=reader.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=reader.count("vocab_size"),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position=max_position,
        context_limit=_context_limit(directory, rope, max_position),
        dtype=_dtype(reader, stored),
        windows=_WINDOWS[architecture](reader, layers),
        tied=reader.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and reader.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        bos_id=next(iter(_ids(reader, config.get("bos_token_id"))), None),
        eos_ids=tuple(
            dict.fromkeys(_ids(reader, generation.get("eos_token_id")) + _ids(reader, config.get("eos_token_id")))
        ),
        generation={k: generation[k] for k in GENERATION_KEYS if isinstance(generation.get(k), int | float)},
        stored_parameters=stored_parameters(stored) or None,
        quantization=read_quantization(reader, stored),
    )


def _architecture(reader: Reader) -> str:
    named = reader.get("architectures", [])
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise reader.wrong("architectures", "must be a list of names")
    for name in named:
        if name in ARCHITECTURES:
            return str(name)
    kind = str(reader.get("model_type", "unknown"))
    if not named:
        for name in ARCHITECTURES:
            if name.lower() == kind + "forcausallm":
                return name
    raise ModelError(
        f"The architecture {', '.join(named) or kind} is not supported. Supported: {', '.join(ARCHITECTURES)}."
    )


def _biases(architecture: str, reader: Reader) -> tuple[bool, bool]:
    """Whether q, k, v and the output projection have biases."""
    if architecture == "Qwen2ForCausalLM":
        return True, False
    if architecture == "MistralForCausalLM":
        return False, False
    return reader.flag("attention_bias"), reader.flag("attention_bias")


def _no_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _mistral_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """One window for all layers; null is none, a missing key is Mistral's 4096."""
    if "sliding_window" in reader.config and reader.config["sliding_window"] is None:
        return (None,) * layers
    return (reader.count("sliding_window", 4096),) * layers


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


_DEFAULT_POSITIONS = {
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 131072,
    "Qwen2ForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
}
_WINDOWS: dict[str, Callable[[Reader, int], tuple[int | None, ...]]] = {
    "LlamaForCausalLM": _no_windows,
    "MistralForCausalLM": _mistral_windows,
    "Qwen2ForCausalLM": _qwen_windows,
    "Qwen3ForCausalLM": _qwen_windows,
}
ARCHITECTURES = tuple(_WINDOWS)


def _rope(reader: Reader, max_position: int) -> RopeSpec:
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
    outer = reader.number("rope_theta", 10000.0)
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
        stated = checkpoint.read_json(directory / "tokenizer_config.json", limit=_CONFIG_LIMIT).get("model_max_length")
        if type(stated) is int and max_position <= stated < limit:
            limit = stated
    return limit


def _dtype(reader: Reader, stored: Mapping[str, checkpoint.TensorInfo]) -> str:
    named = str(reader.get("dtype", reader.get("torch_dtype", ""))).removeprefix("torch.")
    if named in DTYPE_BYTES:
        return named
    sizes: dict[str, int] = {}
    for info in stored.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    most = max(sizes, key=lambda k: sizes[k], default="F32")
    return _SAFETENSORS_DTYPES.get(most, "float32")


def _ids(reader: Reader, value: Any) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int for v in values):
        raise ModelError(f"A token id in {reader.path.parent} is {value!r}; it must be a whole number or a list.")
    return [v for v in values if v >= 0]
