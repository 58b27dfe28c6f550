"""A model's shape, limits and costs, read from its files without torch and without weights."""

from ropeway.modelspec.quantization import QuantSpec
from ropeway.modelspec.spec import (
    ARCHITECTURES,
    DTYPE_BYTES,
    GENERATION_KEYS,
    ROPE_KINDS,
    ModelSpec,
    RopeSpec,
    load_spec,
)

__all__ = [
    "ARCHITECTURES",
    "DTYPE_BYTES",
    "GENERATION_KEYS",
    "ROPE_KINDS",
    "ModelSpec",
    "QuantSpec",
    "RopeSpec",
    "load_spec",
]
