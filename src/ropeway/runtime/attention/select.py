"""Choose the attention back end of a model on a device, and say why."""

from __future__ import annotations

import torch

from ropeway.errors import ConfigError
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.attention.flashinfer import FlashInferBackend
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.attention.triton import TritonBackend

BACKENDS: dict[str, type[AttentionBackend]] = {
    "cpu": CpuBackend,
    "triton": TritonBackend,
    "flashinfer": FlashInferBackend,
    "reference": ReferenceBackend,
}
PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "flashinfer", "reference")}
"""What "auto" tries on a type of device, in order. FlashInfer is for those who ask: it needs Triton too."""


def select(spec: AttentionSpec, device: torch.device, wanted: str = "auto") -> tuple[AttentionBackend, list[str]]:
    """The back end to use and one sentence for each that was passed over.

    `wanted` is "auto" (the first of `PREFERRED` that supports the model) or a name. Raises ConfigError if the named one
    does not exist or cannot serve this model here.
    """
    if wanted != "auto":
        if wanted not in BACKENDS:
            raise ConfigError(
                f"There is no attention back end {wanted!r}. Use auto or one of {', '.join(BACKENDS)}.",
                param="attention_backend",
            )
        reason = BACKENDS[wanted].supports(spec, device)
        if reason is not None:
            raise ConfigError(
                f"The attention back end {wanted!r} cannot serve this model on {device.type}: {reason}. "
                "Use --attention-backend auto.",
                param="attention_backend",
            )
        return BACKENDS[wanted](spec, device), []
    passed_over: list[str] = []
    for name in PREFERRED.get(device.type, ("reference",)):
        reason = BACKENDS[name].supports(spec, device)
        if reason is None:
            return BACKENDS[name](spec, device), passed_over
        passed_over.append(f"{name}: {reason}")
    raise AssertionError("the reference back end supports everything")
