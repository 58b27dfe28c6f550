"""Read the tensors of a safetensors checkpoint, one fused weight at a time, straight into the wanted dtype.

Files are mapped, not read: what is resident beyond the finished weights is one tensor's pages, given back after use.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ropeway import checkpoint
from ropeway.checkpoint import TensorInfo
from ropeway.errors import ModelError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NAMED = 5


class Weights:
    """The tensors of a checkpoint directory, each to be taken once.

    `take` and `fuse` return new tensors of `dtype` on the CPU. `finish` refuses a checkpoint with tensors that the
    model has not asked for. Use as a context manager, so that the mappings are closed.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory = directory
        self.dtype = dtype
        self._tensors = checkpoint.tensors(directory)
        self._left = set(self._tensors)
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name`. Raises ModelError if it is missing or of another shape."""
        return self.fuse([name], [tuple(shape)])

    def fuse(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The tensors `names` one below the other along the first dimension, as one tensor."""
        infos = [self._check(name, shape) for name, shape in zip(names, shapes, strict=True)]
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype)
        first = 0
        for info in infos:
            self._copy(info, out[first : first + info.shape[0]])
            first += info.shape[0]
        return out

    def ignore(self, names: Iterable[str]) -> None:
        """Tensors that the model knows and does not need."""
        self._left -= set(names)

    def finish(self) -> None:
        """Raises ModelError if a tensor was never asked for: then this is not the model that config.json describes."""
        # Older checkpoints store the rotary frequencies, which follow from the configuration.
        left = sorted(name for name in self._left if not name.endswith(".rotary_emb.inv_freq"))
        if left:
            raise ModelError(
                f"The checkpoint in {self.directory} has {_listed(left)} that the model of its config.json does not "
                "have. Check that config.json belongs to these weights."
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
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
        if info.dtype not in _DTYPES:
            raise ModelError(
                f"The tensor {name!r} in {info.file} is {info.dtype}; only {', '.join(_DTYPES)} can be loaded."
            )
        self._left.discard(name)
        return info

    def _copy(self, info: TensorInfo, out: Tensor) -> None:
        if info.elements == 0:
            return
        mapped = self._mapped(info.file)
        dtype = _DTYPES[info.dtype]
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
