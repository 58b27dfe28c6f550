"""Who runs against whom: each engine in each column with the settings that were found best for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

COLUMNS = ("bf16", "int8", "int4")
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
"""Bytes of a weight, and of its share of a group's scale, that a step must read at least."""


@dataclass(frozen=True)
class Contender:
    """An engine with its settings. `form` is what the file or directory of a model is called after the model's name."""

    name: str
    engine: str
    column: str
    form: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _openvino(column: str, precision: str) -> Contender:
    scheduler = {
        "cache_size": 3,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 256,
        "dynamic_split_fuse": True,
        "enable_prefix_caching": True,
    }
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    settings = {"scheduler": scheduler, "properties": properties}
    return Contender(f"openvino-{column}", "openvino", column, f"-ov-{column}", settings)


def _llamacpp(column: str, form: str) -> Contender:
    flags = ["-np", "32", "-c", "32768", "-fa", "on", "-b", "2048", "-ub", "512"]
    return Contender(f"llama.cpp-{form}", "llama.cpp", column, f"-{form}.gguf", {"flags": flags})


def _vllm(column: str, form: str, dtype: str, **settings: Any) -> Contender:
    name = f"vllm-{form.strip('-') or dtype}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return Contender(name, "vllm", column, form, {"dtype": dtype, "max_model_len": 2048, **settings}, environment)


def _transformers(mode: str, dtype: str, **settings: Any) -> Contender:
    attention = "paged|sdpa" if mode == "continuous" else "sdpa"
    settings = {"mode": mode, "dtype": dtype, "attention": attention, **settings}
    return Contender(f"transformers-{mode}-{dtype}", "transformers", "bf16", "", settings, {"HF_HUB_OFFLINE": "1"})


def _ropeway(column: str, **settings: Any) -> Contender:
    return Contender(
        f"ropeway-{column}", "ropeway", column, "", {"dtype": "bfloat16", "max_model_len": 2048, **settings}
    )


def known(*, bf16_native: bool) -> list[Contender]:
    """Everybody. Where the processor does not multiply bfloat16 itself, engines that only emulate it compute in
    float32 instead, which is faster there; weights of 16 bits or more all belong into the first column."""
    wide = "bfloat16" if bf16_native else "float32"
    hint = "bf16" if bf16_native else "f32"
    return [
        _ropeway("bf16"),
        _vllm("bf16", "", wide),
        _openvino("bf16", hint),
        _llamacpp("bf16", "bf16"),
        *([] if bf16_native else [_llamacpp("bf16", "F16")]),
        _transformers("static", wide, batch=16),
        _transformers("continuous", wide),
        _ropeway("int8", quantization="int8"),
        _vllm("int8", "-w8a8", wide),
        _openvino("int8", hint),
        _llamacpp("int8", "Q8_0"),
        _ropeway("int4", quantization="int4"),
        _openvino("int4", hint),
        _llamacpp("int4", "Q4_0"),
    ]


def with_settings(contenders: list[Contender], changes: list[str]) -> list[Contender]:
    """Apply `CONTENDER.KEY=VALUE` changes to settings, VALUE as JSON or else text. Raises SystemExit on nonsense."""
    found = {contender.name: contender for contender in contenders}
    for change in changes:
        path, equals, text = change.partition("=")
        name = next((n for n in found if path.startswith(f"{n}.")), None)
        if not equals or name is None:
            raise SystemExit(f"--set {change!r} is not NAME.KEY=VALUE with a NAME of: {', '.join(found)}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        settings = {**found[name].settings, path[len(name) + 1 :]: value}
        found[name] = replace(found[name], settings=settings)
    return list(found.values())


def with_environment(contenders: list[Contender], changes: list[str]) -> list[Contender]:
    """Apply `ENGINE.VARIABLE=VALUE` changes to the environment of all contenders of an engine. Raises SystemExit."""
    for change in changes:
        path, equals, value = change.partition("=")
        engine, dot, variable = path.rpartition(".")
        if not equals or not dot or engine not in {c.engine for c in contenders}:
            engines = ", ".join(dict.fromkeys(c.engine for c in contenders))
            raise SystemExit(f"--env {change!r} is not ENGINE.VARIABLE=VALUE with an ENGINE of: {engines}.")
        changed = {c.name: {**c.environment, variable: value} for c in contenders if c.engine == engine}
        contenders = [replace(c, environment=changed.get(c.name, c.environment)) for c in contenders]
    return contenders
