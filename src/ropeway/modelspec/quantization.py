"""Which quantized checkpoints can be loaded, read from `quantization_config` and the names of the stored tensors.

Read are compressed-tensors `int-quantized` (W8A8, W8A16), `pack-quantized` (W4A16) and `float-quantized` (fp8), the fp8
of Qwen3's and DeepSeek's own checkpoints, GPTQ and AWQ (4 bits). Whether a layer is quantized follows from the tensors
that the checkpoint has for it, so no list of exceptions is interpreted. How they are computed is the device's to say,
see `runtime.quantization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ropeway.checkpoint import TensorInfo
from ropeway.errors import ModelError
from ropeway.modelspec.reader import Reader

SUPPORTED = (
    "compressed-tensors int-quantized (8 bits, per channel), pack-quantized (4 bits) and float-quantized (fp8), fp8 in "
    "e4m3 with scales per tensor or block, GPTQ and AWQ of 4 bits, and plain checkpoints, which --quantization int8, "
    "int4 or fp8 quantizes while loading"
)
SCALE_BYTES = {"int8": 4, "fp8": 4, "int4": 3}
"""Bytes beside the quantized values: a float32 scale for each channel of int8 and fp8 (or for each block of a channel),
and a float16 scale and a zero point for each group of int4 (symmetric ones save the zero point)."""
_PACKED = (".weight_packed", ".qweight")
_SCALES = (".weight_scale", ".weight_scale_inv", ".scales")
_BYTES = ("I8", "F8_E4M3")
_PARTS = (*_SCALES, ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".qzeros", ".g_idx")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How the linear layers of a checkpoint are stored.

    `method` is 'compressed-tensors', 'gptq', 'awq' or 'fp8'; `format` what they are computed as, 'int8', 'int4' or
    'fp8'; `group` the input features that share a scale, 0 for all of them, and `tall` the output features that do in
    blocks of fp8, else 0. `widened` says that they are held in the model's dtype instead, as fp8 is wherever the device
    does not compute in it. `zero_offset` is what GPTQ's first format subtracts from zero points. `weights` and `scales`
    count what is stored quantized (None without weights at hand), scales as they are held. `notes` say where the engine
    computes otherwise than the configuration says.
    """

    method: str
    format: str
    group: int
    tall: int = 0
    widened: bool = False
    symmetric: bool = True
    zero_offset: int = 0
    weights: int | None = None
    scales: int | None = None
    notes: tuple[str, ...] = ()


def packed_bytes(format: str, weights: int, scales: int) -> int:
    """Bytes of `weights` quantized values with `scales` scales, as the kernels keep them."""
    return (weights // 2 if format == "int4" else weights) + scales * SCALE_BYTES[format]


def matrix_bytes(format: str, outs: int, ins: int, group: int) -> int:
    """Bytes of one weight (outs, ins) in `format`, int4 with a scale for every `group` inputs or fewer. One that cannot
    be grouped is int8, see `weights.loader`."""
    size = kernel_group(ins, group) if format == "int4" else 0
    return packed_bytes("int4", outs * ins, outs * ins // size) if size else packed_bytes("int8", outs * ins, outs)


def kernel_group(inputs: int, most: int = 128) -> int:
    """The largest group of at most `most` that the int4 kernels know and that divides `inputs`; 0 if there is none."""
    return next((size for size in (128, 64, 32) if size <= most and inputs % size == 0), 0)


def stored_parameters(stored: Mapping[str, TensorInfo]) -> int:
    """Number of parameters by the headers of a checkpoint, whether stored plainly or in packed words of 8 nibbles."""
    return sum(
        t.elements * (8 if name.endswith(_PACKED) else 1) for name, t in stored.items() if not name.endswith(_PARTS)
    )


_STATIC = "Static activation scales are not used: activations are quantized for each token as it comes."
_LAYOUTS = {
    "int-quantized": ("int8", 8, "int", ("channel", "tensor")),
    "pack-quantized": ("int4", 4, "int", ("group", "channel")),
    "float-quantized": ("fp8", 8, "float", ("channel", "tensor", "block")),
}
"""Of compressed-tensors: what it is computed as, bits and type of the weights, and what may share a scale."""


def read_quantization(reader: Reader, stored: Mapping[str, TensorInfo]) -> QuantSpec | None:
    """How the checkpoint is quantized, or None. Raises ModelError, with what is supported, for what is not."""
    key = "quantization_config" if reader.get("quantization_config") is not None else "compression_config"
    given = reader.get(key)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise reader.wrong(key, "must be an object")
    config = Reader(given, reader.path)
    method = str(config.get("quant_method", "unknown"))
    readers = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq, "fp8": _fp8}
    if method not in readers:
        raise _refusal(reader, f"quant_method {method!r}")
    found = readers[method](config)
    if not stored:
        return found
    weights = sum(
        t.elements if t.dtype in _BYTES else 8 * t.elements
        for name, t in stored.items()
        if name.endswith(_PACKED) or (name.endswith(".weight") and t.dtype in _BYTES)
    )
    scales = sum(t.elements for name, t in stored.items() if name.endswith(_SCALES)) * max(found.tall, 1)
    return replace(found, weights=weights, scales=scales)


def _refusal(reader: Reader, what: str) -> ModelError:
    return ModelError(f"{reader.path} is quantized with {what}, which cannot be loaded. Supported: {SUPPORTED}.")


def _compressed(config: Reader) -> QuantSpec:
    """https://github.com/vllm-project/compressed-tensors: groups of layers with `weights` and `input_activations`."""
    groups = config.get("config_groups", {})
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise config.wrong("config_groups", "must hold at least one group of layers")
    sparsity = config.get("sparsity_config", {})
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _refusal(config, f"the sparsity format {sparsity['format']!r}")
    notes: dict[str, None] = {}
    found = {_scheme(config, group, notes) for group in groups.values()}
    if len(found) > 1:
        raise _refusal(config, f"{len(found)} different schemes for its layers")
    if config.get("kv_cache_scheme") is not None:
        notes["The checkpoint's scheme for the KV cache is not used: the cache is kept in the model's dtype."] = None
    return replace(found.pop(), notes=tuple(notes))


def _scheme(config: Reader, group: Mapping[str, Any], notes: dict[str, None]) -> QuantSpec:
    """One group of layers."""
    layout = str(group.get("format") or config.get("format", "unknown"))
    weights, inputs = group.get("weights"), group.get("input_activations")
    if layout not in _LAYOUTS or not isinstance(weights, dict):
        raise _refusal(config, f"the format {layout!r}")
    format, most, kind, strategies = _LAYOUTS[layout]
    bits, strategy = weights.get("num_bits", 8), weights.get("strategy")
    symmetric = weights.get("symmetric", True)
    if weights.get("type", "int") != kind or bits != most:
        raise _refusal(config, f"{bits}-bit {weights.get('type', 'int')} weights in the format {layout!r}")
    if strategy not in strategies or (most == 8 and not symmetric):
        raise _refusal(config, f"{bits}-bit weights {_words(symmetric)} per {strategy}")
    if isinstance(inputs, dict):
        if inputs.get("num_bits", 8) != 8 or inputs.get("type", "int") != kind:
            raise _refusal(config, f"{inputs.get('num_bits')}-bit {inputs.get('type', 'int')} activations")
        if not inputs.get("dynamic", False):
            notes[_STATIC] = None
        elif not inputs.get("symmetric", True):
            notes["Activations are quantized symmetrically, where the checkpoint asks for zero points."] = None
    tall, size = _block(config, weights.get("block_structure")) if strategy == "block" else (0, 0)
    if strategy == "group":
        size = _group(config, weights.get("group_size"))
    return QuantSpec(
        method="compressed-tensors",
        format=format,
        group=size,
        tall=tall,
        widened=format == "fp8",
        symmetric=bool(symmetric),
    )


def _fp8(config: Reader) -> QuantSpec:
    """The layout of DeepSeek-V3's and Qwen3's own checkpoints, and of transformers' fine-grained fp8."""
    kind, size = str(config.get("fmt", "e4m3")), config.get("weight_block_size")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _refusal(config, f"fp8 of the kind {kind!r}")
    tall, group = (0, 0) if size is None else _block(config, size)
    notes = () if config.get("activation_scheme", "dynamic") == "dynamic" else (_STATIC,)
    return QuantSpec(method="fp8", format="fp8", group=group, tall=tall, widened=True, notes=notes)


def _block(config: Reader, size: Any) -> tuple[int, int]:
    """Output and input features of a block with a scale of its own."""
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)) or size[1] % 32:
        raise _refusal(config, f"a scale for every block of {size} (the second number must be a multiple of 32)")
    return size[0], size[1]


def _gptq(config: Reader) -> QuantSpec:
    """AutoGPTQ and GPTQModel. The first format stores zero points less one (4 bits, wrapping), 'gptq_v2' as is."""
    bits = config.get("bits", 4)
    layout = str(config.get("checkpoint_format", "gptq"))
    if bits != 4:
        raise _refusal(config, f"{bits}-bit GPTQ")
    if layout not in ("gptq", "gptq_v2"):
        raise _refusal(config, f"GPTQ in the layout {layout!r}")
    if config.get("dynamic"):
        raise _refusal(config, "GPTQ of different bits for different layers ('dynamic')")
    return QuantSpec(
        method="gptq",
        format="int4",
        group=_group(config, config.get("group_size", -1)),
        symmetric=bool(config.get("sym", True)),
        zero_offset=1 if layout == "gptq" else 0,
    )


def _awq(config: Reader) -> QuantSpec:
    """AutoAWQ's 'gemm' layout."""
    bits = config.get("bits", config.get("w_bit", 4))
    layout = str(config.get("version", "gemm")).lower()
    if bits != 4 or layout != "gemm":
        raise _refusal(config, f"{bits}-bit AWQ in the layout {layout!r}")
    size = config.get("group_size", config.get("q_group_size", 128))
    return QuantSpec(
        method="awq", format="int4", group=_group(config, size), symmetric=not config.get("zero_point", True)
    )


def _group(config: Reader, size: Any) -> int:
    """Input features for each scale; 0 for all of them. The kernels take multiples of 32."""
    if size is None or size == -1:
        return 0
    if type(size) is not int or size <= 0 or size % 32:
        raise _refusal(config, f"a scale for every {size} input features (32, 64, 128 or another multiple of 32 works)")
    return size


def _words(symmetric: bool) -> str:
    return "symmetric" if symmetric else "with zero points"
