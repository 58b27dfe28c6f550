"""From a checkpoint's directory to its spec, whoever computes it."""

from __future__ import annotations

from pathlib import Path

from ropeway.errors import ModelError
from ropeway.modelspec.encoder import encoder_architecture, read_encoder
from ropeway.modelspec.files import Files
from ropeway.modelspec.generic import read_generic
from ropeway.modelspec.native import ARCHITECTURES, native_architecture, read_native
from ropeway.modelspec.spec import ModelSpec


def load_spec(directory: Path, name: str | None = None, implementation: str = "auto") -> ModelSpec:
    """The spec of the model in `directory`. `implementation` is 'auto' (native code where there is some, else that of
    transformers), 'native' or 'transformers'. Raises ModelError if it is damaged or cannot be served so."""
    files = Files.read(directory)
    name = name or directory.resolve().name
    native, encoder = native_architecture(files.config), encoder_architecture(files.config)
    if native is not None and implementation != "transformers":
        return read_native(files, native, name)
    if encoder is not None and implementation != "transformers":
        return read_encoder(files, encoder, name)
    if implementation == "native":
        named = ", ".join(files.config.names("architectures")) or files.config.get("model_type", "unknown")
        raise ModelError(
            f"There is no native code for {named}, only for {', '.join(ARCHITECTURES)}. Use --model-impl auto: that of "
            "transformers may compute it."
        )
    return read_generic(files, name)
