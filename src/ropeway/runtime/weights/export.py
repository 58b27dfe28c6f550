"""Write a quantized checkpoint, one tensor at a time, as compressed-tensors lays it out, so that others can read it.

int8 becomes `int-quantized` (W8A8: activations are quantized for each token as it comes), fp8 `float-quantized` (the
same in e4m3), int4 `pack-quantized` (W4A16, with zero points). The LM head, the embeddings, the norms and the routers
of experts stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropeway import checkpoint
from ropeway.errors import ConfigError
from ropeway.modelspec import ModelSpec
from ropeway.modelspec.quantization import kernel_group
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.weights.formats import pack_nibbles
from ropeway.runtime.weights.loader import Weights

SHARD_BYTES = 4 << 30
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.int32: "I32",
          torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
_LAYOUTS = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
_PLAIN = (r"re:.*\.gate$", r"re:.*\.kv_b_proj$")
"""Linear layers beside experts that are not quantized, as compressed-tensors names them: routers, and the expansion of
latents."""
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}

Quantize = Callable[[str, Tensor], QuantizedWeight]
"""The weight of a layer, by the layer's name."""


def write_quantized(
    spec: ModelSpec,
    out: Path,
    format: str,
    group: int,
    quantize: Quantize,
    done: Callable[[], None] = lambda: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the plain checkpoint of `spec` to the new directory `out` in `format` ('int8', 'int4' or 'fp8').

    `out` appears when it is complete. `done` is called after each layer that was quantized. Returns the weight files.
    Raises ConfigError if there is something at `out`, the checkpoint is quantized already, or int4 does not fit it.
    """
    check(spec, out, format, group)
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True)
    try:
        with Weights(spec.directory, torch.float32) as weights:
            names = spec.modules
            _check_names(weights, names)
            # Four tensors stand for a layer at most; an entry has its name and less than 160 characters more.
            room = 256 + sum(len(name) + 160 for name in weights.shapes()) + sum(4 * (len(n) + 180) for n in names)
            files = _write_shards(part, _tensors(weights, names, quantize, done), room, shard_bytes)
        _copy_others(spec.directory, part)
        config = json.loads((spec.directory / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = scheme(format, group, ["lm_head", *_PLAIN] if spec.experts else ["lm_head"])
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [out / file.name for file in files]


def check(spec: ModelSpec, out: Path, format: str, group: int) -> None:
    """Raises ConfigError if `write_quantized` cannot succeed."""
    if spec.quantization is not None:
        raise ConfigError(f"{spec.name} is quantized already ({spec.quantization.method}). Give the plain checkpoint.")
    for path in (out, out.with_name(out.name + ".part")):
        if path.exists():
            raise ConfigError(f"{path} exists. Remove it or name another directory.")
    depths = {ins for _, ins in spec.linears}
    if format == "int4" and any(kernel_group(ins, group) != group for ins in depths):
        fits = [size for size in (128, 64, 32) if all(ins % size == 0 for ins in depths)]
        use = f"Use --group {fits[0]}." if fits else "Use --quantization int8."
        raise ConfigError(f"Layers with {sorted(depths)} inputs cannot be split in groups of {group}. {use}")


def _check_names(weights: Weights, names: list[str]) -> None:
    """Raises ConfigError if a layer is not stored by itself, as it is where experts are stacked."""
    stored = weights.shapes()
    missing = [name for name in names if f"{name}.weight" not in stored]
    if missing:
        raise ConfigError(
            f"The checkpoint in {weights.directory} does not store {missing[0]} as a matrix of its own (one of "
            f"{len(missing)}), so it cannot be quantized on disk. Serve it with --quantization int8 or int4 instead."
        )


def scheme(format: str, group: int, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """`quantization_config` in the words of compressed-tensors; `ignore` are the linear layers that stay plain."""
    eight, kind = format != "int4", "float" if format == "fp8" else "int"
    weights = {
        "num_bits": 8 if eight else 4,
        "type": kind,
        "symmetric": eight,
        "strategy": "channel" if eight else "group",
        "group_size": None if eight else group,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    layout = _LAYOUTS[format]
    layers = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if eight else None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": {**layers, "output_activations": None, "format": layout}},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def stored(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by the end of their names; scales in `dtype`."""
    if weight.format != "int4":
        return {"weight": weight.values, "weight_scale": weight.scales[:, None].to(dtype)}
    zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    return {
        "weight_packed": pack_nibbles(weight.values),
        "weight_scale": weight.scales.to(dtype),
        "weight_zero_point": pack_nibbles(zeros.T.contiguous()).T.contiguous(),
        "weight_shape": torch.tensor(weight.values.shape),
    }


def _tensors(
    weights: Weights, quantized: list[str], quantize: Quantize, done: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new checkpoint: those that stay, then the layers."""
    modules = {module + ".weight" for module in quantized}
    for name, shape in weights.shapes().items():
        if name not in modules:
            yield name, weights.raw(name, [shape])
    for module in quantized:
        plain = weights.raw(module + ".weight", [weights.shapes()[module + ".weight"]])
        for part, tensor in stored(quantize(module, plain), plain.dtype).items():
            yield f"{module}.{part}", tensor
        done()


class _Shard:
    """A safetensors file written as its tensors come. The header, which stands first, is filled in at the end: `room`
    bytes are left for it, and the format lets it end in spaces."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.names: list[str] = []
        self.size = 0
        self._room = -(-room // 8) * 8
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.file = path.open("wb")
        self.file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        end = self.size + data.nbytes
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.size, end],
        }  # fmt: skip
        self.file.write(data.data)
        self.names.append(name)
        self.size = end

    def close(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self.file.close()


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], room: int, most: int) -> list[Path]:
    """Write files of `most` bytes or a tensor more, and their index if there are several."""
    shards: list[_Shard] = []
    with ExitStack() as opened:
        for name, tensor in tensors:
            if not shards or shards[-1].size >= most:
                for full in shards[-1:]:
                    full.close()
                shards.append(_Shard(directory / f"{len(shards)}.safetensors", room))
                opened.callback(shards[-1].file.close)
            shards[-1].add(name, tensor)
        shards[-1].close()
    if len(shards) == 1:
        return [shards[0].path.rename(directory / checkpoint.SINGLE)]
    files = [directory / f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    where = {name: file.name for shard, file in zip(shards, files, strict=True) for name in shard.names}
    index = {"metadata": {"total_size": sum(s.size for s in shards)}, "weight_map": where}
    (directory / checkpoint.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [shard.path.rename(file) for shard, file in zip(shards, files, strict=True)]


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, templates, generation defaults, licence: every file that is neither weights nor config.json."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHT_FILES and file.name not in ("config.json", checkpoint.INDEX):
            shutil.copyfile(file, target / file.name)
