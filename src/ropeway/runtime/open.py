"""The executor that a model needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ropeway.config import EngineConfig
from ropeway.hub import locate
from ropeway.modelspec import EncoderSpec, load_spec
from ropeway.runtime.torch_version import check_torch

if TYPE_CHECKING:
    from ropeway.runtime.local import LocalExecutor


def open_executor(config: EngineConfig) -> LocalExecutor:
    """Load the model of `config`, decoder or encoder. Raises ModelError, MemoryBudgetError, ConfigError or KernelError
    if it cannot be served."""
    check_torch()
    from ropeway.runtime.encoder import EncoderExecutor
    from ropeway.runtime.local import LocalExecutor

    directory = locate(config.model, revision=config.revision, download_dir=config.download_dir)
    spec = load_spec(directory, config.model, config.model_impl)
    return EncoderExecutor(config, spec) if isinstance(spec, EncoderSpec) else LocalExecutor(config, spec)
