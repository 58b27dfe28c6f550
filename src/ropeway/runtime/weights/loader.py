"""Read the tensors of a safetensors checkpoint, one fused weight at a time, straight into the wanted dtype or format.

For a CPU files are mapped, not read: what is resident beyond the finished weights is one tensor's pages, given back
after use. For another device nothing but an `Uploader`'s buffers is.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ropeway import checkpoint
from ropeway.checkpoint import TensorInfo
from ropeway.errors import ConfigError, ModelError
from ropeway.modelspec import QuantSpec
from ropeway.modelspec.quantization import kernel_group
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.streams import open_streams
from ropeway.runtime.weights import formats
from ropeway.runtime.weights.quant import quantize_fp8, quantize_int4, quantize_int8
from ropeway.runtime.weights.upload import Uploader

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_RAW = {**_DTYPES, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
_CPU = torch.device("cpu")
_NAMED = 5
_UNUSED = (".rotary_emb.inv_freq",)
"""Endings of tensors that no model needs: older checkpoints store the rotary frequencies, which follow from the
configuration."""
_UNUSED_QUANTIZED = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")
"""Static scales of activations and of the KV cache, see `QuantSpec.notes`."""


class Weights:
    """The tensors of a checkpoint directory, each to be taken once.

    `take` and `fuse` return new tensors of `dtype` on `device`, through an `uploader` if one is given or the device is
    not the CPU; `raw` returns them on the CPU. `linear`, `head` and `quantize` return quantized weights where the
    checkpoint (`stored`) has them or `quantization` ('auto', 'int8', 'int4', 'fp8') asks for them, int4 with a scale
    for every `group` input features or fewer; what is `widened` in `stored` counts as plain. `finish` refuses a
    checkpoint with tensors that the model has not asked for. Use as a context manager, so that files are closed. Raises
    ConfigError if the checkpoint is quantized otherwise than `quantization` asks for.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        stored: QuantSpec | None = None,
        quantization: str = "auto",
        group: int = 64,
        *,
        device: torch.device = _CPU,
        uploader: Uploader | None = None,
    ) -> None:
        if stored is not None and not stored.widened and quantization not in ("auto", stored.format):
            raise ConfigError(
                f"quantization is {quantization}, but the checkpoint in {directory} is stored in {stored.format} "
                f"({stored.method}). Use --quantization {stored.format} or auto, or take the plain checkpoint.",
                param="quantization",
            )
        self.directory = directory
        self.dtype = dtype
        self.device = device
        self.stored = stored
        self._quantization = quantization
        self._group = group
        self._tensors = checkpoint.tensors(directory)
        if "embed_tokens.weight" in self._tensors:  # an embedding model, saved without the part that generates
            self._tensors = {f"model.{name}": info for name, info in self._tensors.items()}
        self._left = set(self._tensors)
        self._maps: dict[Path, mmap.mmap] = {}
        streams = open_streams(device) if uploader is None else None
        self._uploader = uploader if streams is None else Uploader(streams)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()
        if self._uploader is not None:
            self._uploader.close()

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name`. Raises ModelError if it is missing or of another shape."""
        return self.fuse([name], [tuple(shape)])

    def fuse(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The tensors `names` one below the other along the first dimension, as one tensor."""
        infos = [self._check(name, shape) for name, shape in zip(names, shapes, strict=True)]
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        parts = list(zip(infos, torch.split(out, [info.shape[0] for info in infos]), strict=True))
        if self._uploader is not None:
            self._uploader.fill([(info, _DTYPES[info.dtype], part) for info, part in parts])
            return out
        for info, part in parts:
            self._copy(info, part)
        return out

    def linear(self, modules: Sequence[str], outs: Sequence[int], ins: int) -> Tensor | QuantizedWeight:
        """The weights of linear layers with the same input, one below the other: (sum of outs, ins)."""
        found = self._stored_or_plain(modules, outs, ins)
        return found if isinstance(found, QuantizedWeight) else self.quantize(found)

    def head(self, module: str, vocab: int, ins: int) -> Tensor | QuantizedWeight:
        """The LM head, (vocab, ins), where it is a layer of its own."""
        found = self._stored_or_plain([module], [vocab], ins)
        return found if isinstance(found, QuantizedWeight) else self.quantize(found, head=True)

    def _stored_or_plain(self, modules: Sequence[str], outs: Sequence[int], ins: int) -> Tensor | QuantizedWeight:
        """Quantized if the checkpoint has it so, and the device computes with that."""
        quantized = [self.stored is not None and formats.is_quantized(self, module) for module in modules]
        if all(quantized) and self.stored is not None:
            self._drop_zero_biases(modules)
            parts = [formats.read(self, self.stored, m, out, ins) for m, out in zip(modules, outs, strict=True)]
            found = formats.join(parts, modules)
            return found.widen(self.dtype).to(self.device) if self.stored.widened else found
        if any(quantized):
            plain = ", ".join(m for m, q in zip(modules, quantized, strict=True) if not q)
            raise ModelError(
                f"The checkpoint in {self.directory} leaves {plain} plain and quantizes the others of "
                f"{', '.join(modules)}, which are computed as one. Quantize all of them or none."
            )
        return self.fuse([module + ".weight" for module in modules], [(out, ins) for out in outs])

    def quantize(self, weight: Tensor, *, head: bool = False) -> Tensor | QuantizedWeight:
        """`weight` (N, K) as `quantization` asks for it. An LM head gets int8 at least: it decides between tokens, and
        int4 or fp8 would blur that. So does a layer with a number of inputs that int4 cannot group by 32."""
        group = 0 if head else kernel_group(weight.shape[1], self._group)
        if self._quantization == "int4" and group:
            return quantize_int4(weight, group)
        if self._quantization == "fp8" and not head:
            return quantize_fp8(weight)
        return weight if self._quantization == "auto" else quantize_int8(weight)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors that are stored, by name."""
        return {name: info.shape for name, info in self._tensors.items()}

    def raw(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The tensor `name` in the type that it is stored in. Raises ModelError unless its shape is one of `shapes`."""
        info = self._tensors.get(name)
        shape = info.shape if info is not None and info.shape in shapes else tuple(shapes[0])
        info = self._check(name, shape, _RAW)
        out = torch.empty(info.shape, dtype=_RAW[info.dtype])
        self._copy(info, out)
        return out

    def ignore(self, names: Iterable[str]) -> None:
        """Tensors that the model knows and does not need."""
        self._left -= set(names)

    def finish(self) -> None:
        """Raises ModelError if a tensor was never asked for: then this is not the model that config.json describes."""
        unused = _UNUSED if self.stored is None else _UNUSED + _UNUSED_QUANTIZED
        left = sorted(name for name in self._left if not name.endswith(unused))
        if left:
            raise ModelError(
                f"The checkpoint in {self.directory} has {_listed(left)} that the model of its config.json does not "
                "have. Check that config.json belongs to these weights."
            )

    def _drop_zero_biases(self, modules: Sequence[str]) -> None:
        """GPTQ writers add biases of zero to layers that have none. One that matters is left for `finish` to refuse."""
        for name in (module + ".bias" for module in modules):
            if name in self._left and bool(self.raw(name, [self._tensors[name].shape]).any()):
                self._left.add(name)

    def _check(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, torch.dtype] = _DTYPES) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise ModelError(
                f"The checkpoint in {self.directory} lacks the tensor {name!r} of shape {list(shape)}. "
                "Check that the download is complete and that config.json belongs to these weights."
            )
        if info.shape != shape:
            raise ModelError(
                f"The tensor {name!r} in {info.file} has shape {list(info.shape)}, but config.json asks for "
                f"{list(shape)}. Check that config.json belongs to these weights."
            )
        if info.dtype not in dtypes:
            raise ModelError(f"The tensor {name!r} in {info.file} is {info.dtype}; it must be {' or '.join(dtypes)}.")
        self._left.discard(name)
        return info

    def _copy(self, info: TensorInfo, out: Tensor) -> None:
        if info.elements == 0:
            return
        mapped = self._mapped(info.file)
        dtype = _RAW[info.dtype]
        if info.begin % dtype.itemsize:
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.end - info.begin, offset=info.begin)
            source = raw.clone().view(dtype)
        else:
            source = torch.frombuffer(mapped, dtype=dtype, count=info.elements, offset=info.begin)
        out.copy_(source.view(info.shape))
        page = mmap.PAGESIZE
        begin, end = -(-info.begin // page) * page, info.end // page * page
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                # Private and copy-on-write, because torch wants writable buffers; nothing is ever written to it.
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"
