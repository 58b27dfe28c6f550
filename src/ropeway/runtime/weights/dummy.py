"""Random weights instead of a checkpoint's: shapes can be measured without downloading anything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError
from ropeway.modelspec import EncoderSpec, ModelSpec
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.weights.loader import Weights


def load_note(config: EngineConfig) -> str:
    """What whoever reads the start-up banner must know, '' for nothing."""
    return (
        "The weights are random, as told by --load-format: answers mean nothing."
        if config.load_format == "dummy"
        else ""
    )


def open_weights(
    spec: ModelSpec | EncoderSpec, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> Weights:
    """The weights of `spec` as `config` wants them. Raises ConfigError if they are to be random and only a checkpoint's
    will do, ModelError if the checkpoint's are not there."""
    stored = spec.quantization if isinstance(spec, ModelSpec) else None
    if config.load_format == "auto":
        return Weights(spec.directory, dtype, stored, config.quantization, config.quantization_group, device=device)
    if spec.implementation == "transformers":
        raise ConfigError(
            f"load_format is dummy, but {spec.name} is computed by transformers' code, which loads its own checkpoint. "
            "Use --load-format auto.",
            param="load_format",
        )
    quantization: str = config.quantization
    group: int = config.quantization_group
    as_stored = stored is not None and not stored.widened and quantization in ("auto", stored.format)
    if stored is not None and as_stored:
        quantization, group = stored.format, stored.group or group
    found = DummyWeights(spec.directory, dtype, quantization, group, device, config.seed)
    found.plain_head = as_stored and config.quantization == "auto"
    return found


class DummyWeights(Weights):
    """Weights of any name and shape, made on `device`: those of one name are the same in every run with the same
    `seed`. Matrices keep the length of what they multiply, so that activations stay in range at any depth. Of a
    checkpoint that is quantized the head may be left plain (`plain_head`)."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, quantization: str, group: int, device: torch.device, seed: int
    ) -> None:
        self.directory, self.dtype, self.device, self.stored = directory, dtype, device, None
        self._quantization, self._group, self._seed = quantization, group, seed
        self._random = torch.Generator(device)
        self.plain_head = False

    def __exit__(self, *_: object) -> None:
        pass

    def fuse(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Tensors `names` one below the other along the first dimension, as one tensor."""
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        self._random.manual_seed(zlib.crc32("\n".join(names).encode(), self._seed & 0xFFFFFFFF))
        if out.dim() > 1:
            return out.normal_(std=out.shape[-1] ** -0.5, generator=self._random)
        out.normal_(std=0.02, generator=self._random)
        return out if "bias" in names[0] else out.add_(1)

    def quantize(self, weight: Tensor, *, head: bool = False) -> Tensor | QuantizedWeight:
        return weight if head and self.plain_head else super().quantize(weight, head=head)

    def raw(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        return self.fuse([name], shapes[:1])

    def has(self, name: str) -> bool:
        return False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def ignore(self, names: Iterable[str]) -> None:
        pass

    def finish(self) -> None:
        pass
