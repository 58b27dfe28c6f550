"""In which numbers the linear layers of a model are held and multiplied, given what the device can do."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import torch

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError
from ropeway.modelspec import ModelSpec
from ropeway.modelspec.quantization import kernel_group
from ropeway.runtime.layers.gpu import lacks_fp8
from ropeway.runtime.layers.linear import Scheme

_Spec = TypeVar("_Spec", bound=ModelSpec)


def fit(spec: _Spec, config: EngineConfig, device: torch.device) -> _Spec:
    """`spec` as `device` computes it: fp8 is widened to the model's dtype where the device has none, or if another
    quantization is asked for. Raises ConfigError if fp8 is asked for where there is none."""
    lacks = lacks_fp8(device)
    if config.quantization == "fp8" and lacks:
        raise ConfigError(f"quantization is fp8, but {lacks}. Use --quantization int8.", param="quantization")
    stored = spec.quantization
    if stored is None or stored.format != "fp8":
        return spec
    return replace(
        spec, quantization=replace(stored, widened=bool(lacks) or config.quantization not in ("auto", "fp8"))
    )


def linear_scheme(config: EngineConfig, spec: ModelSpec) -> Scheme:
    """How the weights of most linear layers are held."""
    if config.quantization != "auto":
        return config.quantization
    stored = spec.quantization
    return "plain" if stored is None or stored.widened else cast(Scheme, stored.format)


def notes(config: EngineConfig, spec: ModelSpec, device: torch.device, dtype: str) -> list[str]:
    """Sentences for the start-up banner."""
    stored = spec.quantization
    activations = _activations(linear_scheme(config, spec), device)
    head = "" if config.quantization == "auto" else "; the LM head int8"
    found: list[str] = []
    if stored is not None and stored.widened:
        why = lacks_fp8(device) or f"{config.quantization} is asked for"
        found = [f"Quantization: the checkpoint's fp8 ({stored.method}) is widened to {dtype} while loading: {why}."]
        found += stored.notes if config.quantization == "auto" else ()
        stored = None
    if stored is not None:
        group = f"in groups of {stored.group}" if stored.group else "per channel"
        group = f"in blocks of {stored.tall} x {stored.group}" if stored.tall else group
        loading = f"{head}, while loading" if head else ""
        how = f"Quantization: {stored.format} {group}, the checkpoint's ({stored.method}){loading}. {activations}"
        return [how, *stored.notes]
    if config.quantization != "auto":
        found.append(f"Quantization: {_wanted(config, spec)}, while loading{head}. {activations}")
    return found


def _activations(scheme: str, device: torch.device) -> str:
    if scheme == "fp8":
        return "Activations fp8 per token."
    if scheme == "int4" and device.type != "cpu":
        return "Activations as they are."
    return "Activations int8 per token."


def _wanted(config: EngineConfig, spec: ModelSpec) -> str:
    """The format, or int4 with what it could not be used for."""
    if config.quantization != "int4":
        return config.quantization
    inputs = [ins for _, ins in spec.linears]
    odd = [ins for ins in inputs if not kernel_group(ins, config.quantization_group)]
    groups = sorted({kernel_group(ins, config.quantization_group) for ins in inputs} - {0})
    found = f"int4 in groups of {' and '.join(map(str, groups))}" if groups else ""
    if not odd:
        return found
    which = "all linear layers" if len(odd) == len(inputs) else f"{len(odd)} of {len(inputs)} linear layers"
    why = f"{which} int8, since groups of 32 do not divide their {' or '.join(map(str, sorted(set(odd))))} inputs"
    return f"{found}; {why}" if found else why
