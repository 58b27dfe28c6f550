"""Families that Ropeway has no code of its own for: what is needed to plan for them, in all spellings of config.json.

transformers computes them (see `runtime.models.transformers_model`), and reads the rest of config.json itself: rotary
embedding, norms, biases, activations, experts. What is read here decides memory and limits alone, and loading compares
it with what the model's code does, so a wrong guess ends in an error and never in a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from ropeway import checkpoint
from ropeway.errors import ModelError
from ropeway.modelspec.files import Files
from ropeway.modelspec.native import ARCHITECTURES
from ropeway.modelspec.reader import Reader
from ropeway.modelspec.spec import DTYPE_BYTES, ModelSpec

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim")
HIDDEN = ("hidden_size", "n_embd", "d_model")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length",
             "model_max_length")  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERT_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size")
_SECTIONS = ("text_config", "attn_config", "ffn_config")
_DEFAULTS: dict[str, dict[str, Any]] = {
    # The published checkpoints leave these out, since they are the defaults of the family's code.
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
                    "max_position_embeddings": 131072},
    "gpt_bigcode": {"multi_query": True},
}  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_STATE_KEYS = ("ssm_cfg", "state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache", "lru_width",
               "linear_num_key_heads", "rescale_every", "hybrid_override_pattern")  # fmt: skip
_ALIBI = ("bloom", "mpt")
_IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")


@dataclass(frozen=True, kw_only=True)
class GenericSpec(ModelSpec):
    """A model that transformers computes.

    `total` is the number of parameters: counted by the headers, or estimated where there are no weights. `matrices` are
    (out_features, in_features) of its linear layers, the experts of a mixture not among them. `windows` is not known
    before loading: transformers' own masks say it then.
    """

    implementation: ClassVar[str] = "transformers"

    total: int
    matrices: tuple[tuple[int, int], ...]

    @property
    def parameters(self) -> int:
        return self.total

    @property
    def linears(self) -> list[tuple[int, int]]:
        return list(self.matrices)


def read_generic(files: Files, name: str) -> GenericSpec:
    """The spec of any decoder. Raises ModelError for what cannot be computed, and for what config.json leaves out."""
    files = Files(files.directory, _flat(files.config), files.generation, files.stored)
    reader = files.config
    architecture = _architecture(reader)
    _refuse(reader, architecture)
    common = files.common(name)
    if common["quantization"] is not None:
        raise ModelError(
            f"{reader.path} is quantized ({common['quantization'].method}), which works for the native families only, "
            f"and {architecture} is computed by transformers. Take the plain checkpoint, with --quantization "
            f"{common['quantization'].format} if it is to be small."
        )
    layers, heads, hidden = _count(reader, LAYERS, high=4096), _count(reader, HEADS), _count(reader, HIDDEN)
    kv_heads = _count(reader, KV_HEADS, 1 if reader.flag("multi_query") else heads)
    vocab = reader.count("vocab_size")
    context = _context(reader)
    shape: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "hidden": hidden,
        "intermediate": _count(reader, INNER, 4 * hidden),
        "kv_heads": kv_heads,
        "head_dim": _count(reader, HEAD_DIM, max(hidden // heads, 1)),
        "vocab": vocab,
    }
    if heads % kv_heads:
        raise ModelError(
            f"{reader.path} has {heads} attention heads and {kv_heads} KV heads, which do not divide them."
        )
    tied = reader.flag("tie_word_embeddings")
    return GenericSpec(
        **common,
        **shape,
        architecture=architecture,
        max_position=context,
        context_limit=context,
        windows=(None,) * layers,
        tied=tied,
        total=_stored(files) or _indexed(files) or _estimated(reader, shape, tied),
        matrices=_matrices(files, shape),
    )


def _flat(reader: Reader) -> Reader:
    """config.json with the sections of a text model among others, and with what its family takes for granted."""
    config: dict[str, Any] = dict(reader.config)
    for section in _SECTIONS:
        if isinstance(config.get(section), Mapping):
            config |= {k: v for k, v in config[section].items() if v is not None}
    kept = {key: value for key, value in config.items() if value is not None}
    return Reader(_DEFAULTS.get(str(config.get("model_type")), {}) | kept, reader.path)


def _architecture(reader: Reader) -> str:
    named = reader.names("architectures")
    for name in named:
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return name
    kind = reader.get("model_type")
    if named or not isinstance(kind, str):
        what = ", ".join(named) or "no architecture and no model_type"
        raise ModelError(
            f"{reader.path} names {what}, which generates no text: a decoder is called ...ForCausalLM. "
            "Check that this is a language model."
        )
    return kind


def _refuse(reader: Reader, architecture: str) -> None:
    """Raises ModelError for kinds of models that paged attention does not compute."""
    kind = str(reader.get("model_type", ""))
    types = reader.get("layer_types", reader.get("layers_block_type", []))
    odd = sorted({str(t) for t in types} - _LAYER_TYPES) if isinstance(types, list) else []
    state = [key for key in _STATE_KEYS if key in reader.config]
    if reader.get("is_encoder_decoder", False):
        reason = "it has an encoder beside its decoder"
    elif odd:
        reason = (
            f"it has layers of the type {', '.join(odd)}, beside attention to all earlier tokens or a window of them"
        )
    elif state or kind in ("rwkv", "xlstm"):
        what = f" ({', '.join(state)} in config.json)" if state else ""
        reason = f"its layers keep a state of their own instead of keys and values{what}"
    elif reader.get("alibi", False) or kind in _ALIBI:
        reason = "it adds a bias for the distance (ALiBi) to attention scores"
    elif reader.get("kv_lora_rank") is not None:
        reason = "it compresses keys and values (multi-head latent attention, kv_lora_rank in config.json)"
    else:
        return
    raise ModelError(
        f"{architecture} in {reader.path} cannot be served: {reason}, which Ropeway does not compute in transformers' "
        f"code. Take a model of a family with native code: {', '.join(ARCHITECTURES)}."
    )


def _count(reader: Reader, keys: tuple[str, ...], default: int | None = None, high: int = 2**31 - 1) -> int:
    """The number under the first of `keys` that is there. Raises ModelError naming them all if none is."""
    for key in keys:
        if reader.get(key) is not None:
            return reader.count(key, high=high)
    if default is None:
        raise ModelError(
            f"{reader.path} has none of {', '.join(keys)}. Families leave out what their code takes for granted: "
            f"add {keys[0]} to the file."
        )
    return default


def _context(reader: Reader) -> int:
    """Positions that the model is made for. Scaling that depends on the length of the longest sequence in the batch
    would let neighbours change an answer, so such a model is served up to where that begins."""
    limit = _count(reader, POSITIONS)
    rope = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise reader.wrong("rope_scaling", "must be an object")
    key = "original_max_position_embeddings"
    sections = [v for v in rope.values() if isinstance(v, Mapping)] or [rope]
    for section in sections:
        inner = Reader(section, reader.path)
        original = inner.count(key, reader.get(key, limit))
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind in ("longrope", "dynamic", "su"):
            limit = min(limit, original)
        elif kind == "yarn":
            limit = max(limit, int(original * inner.number("factor", 1.0)))
    return limit


def _stored(files: Files) -> int:
    """Parameters by the headers. Tensors of four dimensions are masks, which older GPT checkpoints keep."""
    return sum(prod(info.shape) for info in files.stored.values() if len(info.shape) < 4)


def _indexed(files: Files) -> int:
    """Parameters by the index of a sharded checkpoint that is not here itself."""
    path = files.directory / checkpoint.INDEX
    if not path.is_file():
        return 0
    found = checkpoint.read_json(path, limit=checkpoint.MAX_HEADER).get("metadata")
    size = found.get("total_size") if isinstance(found, dict) else None
    return int(size) // DTYPE_BYTES[files.dtype()] if isinstance(size, int | float) else 0


def _estimated(reader: Reader, shape: Mapping[str, int], tied: bool) -> int:
    """As if it were a gated decoder like Llama, with experts if it has some."""
    experts = _count(reader, EXPERTS, 1)
    inner = _count(reader, EXPERT_INNER, shape["intermediate"]) if experts > 1 else shape["intermediate"]
    layer = _attention(shape) + 3 * shape["hidden"] * inner * experts
    return shape["layers"] * layer + shape["vocab"] * shape["hidden"] * (1 if tied else 2)


def _attention(shape: Mapping[str, int]) -> int:
    return 2 * (shape["heads"] + shape["kv_heads"]) * shape["head_dim"] * shape["hidden"]


def _matrices(files: Files, shape: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    """The linear layers by the headers, or those of a gated decoder if there are none."""
    if files.stored:
        return tuple(
            (info.shape[0], info.shape[1])
            for name, info in files.stored.items()
            if _IN_A_LAYER.search(name) and len(info.shape) == 2 and ".experts." not in name
        )
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    hidden, inner = shape["hidden"], shape["intermediate"]
    return ((q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)) * shape["layers"]
