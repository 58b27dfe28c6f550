"""Build the model of a spec together with its attention, whoever's code computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ropeway.config import EngineConfig
from ropeway.errors import ModelError
from ropeway.modelspec import GenericSpec, ModelSpec
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.select import select
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.models import transformers_load, transformers_probe
from ropeway.runtime.models.llama import Llama
from ropeway.runtime.models.registry import MODELS
from ropeway.runtime.models.transformers_check import check
from ropeway.runtime.models.transformers_model import PAGED, TransformersModel, attend, decoder_of
from ropeway.runtime.models.transformers_pack import Packer
from ropeway.runtime.weights.dummy import load_note, open_weights
from ropeway.runtime.weights.loader import Weights


@dataclass(frozen=True)
class Built:
    """A model that can be run. `passed` says of each attention back end before `backend` why it was passed over, `note`
    is a sentence about the model for the start-up banner, such as whose code computes it; '' for nothing."""

    model: Llama | TransformersModel
    attention: AttentionSpec
    backend: AttentionBackend
    passed: list[str]
    note: str = ""


def build(
    spec: ModelSpec,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    level: int,
    max_model_len: int,
) -> Built:
    """Load the weights of `spec` and choose its attention. Raises ModelError, ConfigError or KernelError."""
    with open_weights(spec, config, dtype, device) as weights:
        if isinstance(spec, GenericSpec):
            return _build_generic(spec, config, weights, ops, device, level)
        attention = attention_spec(spec, config, dtype)
        backend, passed = select(attention, device, attention_backend(config, level))
        with torch.inference_mode():
            model = MODELS[spec.architecture](spec, weights, backend, ops, device, max_model_len, level)
    return Built(model, attention, backend, passed, f"{model.note} {load_note(config)}".strip())


def attention_spec(
    spec: ModelSpec,
    config: EngineConfig,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    windows: tuple[int | None, ...] | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """The attention of `spec`; what is given besides is what its code was found to do."""
    return AttentionSpec(
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        block_size=config.block_size,
        dtype=dtype,
        scale=spec.scale if scale is None else scale,
        windows=spec.windows if windows is None else windows,
        softcap=softcap,
        kv_cache_dtype=config.kv_cache_dtype,
        latent=0 if spec.latent is None else spec.latent.rank,
    )


def attention_backend(config: EngineConfig, level: int) -> str:
    """Below level 2 attention is plain torch too, unless the user names a back end."""
    return "reference" if config.attention_backend == "auto" and level < 2 else config.attention_backend


def _build_generic(
    spec: GenericSpec, config: EngineConfig, weights: Weights, ops: Ops, device: torch.device, level: int
) -> Built:
    """A model in transformers' code: what it asks of attention is only known once it is there."""
    transformers = transformers_load.library()
    transformers_probe.register(transformers, PAGED, attend)
    model = transformers_load.load(spec, weights.dtype, device, PAGED)
    try:
        decoder = decoder_of(model, spec)
        calls = transformers_probe.probe(transformers, model, decoder, spec, device)
        windows = tuple(call.window for call in calls)
        found: dict[str, Any] = {"scale": calls[0].scale, "windows": windows, "softcap": calls[0].softcap}
        attention = attention_spec(spec, config, weights.dtype, **found)
        backend, passed = select(attention, device, attention_backend(config, level))
        if (level and device.type == "cpu") or config.quantization != "auto":
            Packer(transformers, weights, ops, device, level).pack(model)
        built = TransformersModel(model, calls, decoder, backend, attention.scale, spec, device)
        difference = check(built, spec, attention)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if "memory" in str(error):
            raise
        raise ModelError(
            f"{spec.architecture} cannot be served: its code in transformers {transformers.__version__} fails with "
            f"{type(error).__name__} when it is called as Ropeway calls it ({str(error).splitlines()[0]})."
        ) from error
    code = f"{type(model).__name__} of transformers {transformers.__version__}"
    note = (
        f"Model: {code}, with Ropeway's paged attention; logits differ from its own by {difference:.0e} of their "
        "spread."
    )
    return Built(built, attention, backend, passed, note)
