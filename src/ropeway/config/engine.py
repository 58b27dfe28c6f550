"""Settings of the engine process, and the presets that set several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ropeway.config.option import option
from ropeway.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine process needs to know. Names are vLLM's where the meaning is equal."""

    model: str = option("bundled", "Model", "Hugging Face directory or hub name; 'bundled' is in the package.")
    revision: str | None = option(None, "Model", "Hub branch, tag or commit to load.")
    download_dir: str | None = option(None, "Model", "Where hub downloads are kept (default: the Hugging Face cache).")
    tokenizer: str | None = option(None, "Model", "Directory or hub name of the tokenizer (default: the model's).")
    model_impl: Literal["auto", "native", "transformers"] = option(
        "auto", "Model", "Whose code computes the model; 'auto': native if there is some, else that of transformers."
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto", "Model", "'dummy' makes random weights of the model's shape, to measure it without its checkpoint."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Model", "Type of weights and KV cache; 'auto' takes the fastest that the device computes natively."
    )
    quantization: Literal["auto", "int8", "int4", "fp8"] = option(
        "auto", "Model", "Quantize linear layers while loading; 'auto' takes the checkpoint as it is, fp8 needs a GPU."
    )
    quantization_group: Literal[32, 64, 128] = option(
        64, "Model", "The most inputs of a linear layer that share a scale in int4."
    )
    max_model_len: int | None = option(
        None, "Model", "Longest prompt plus answer, in tokens (default: the model's own limit).", low=1
    )
    seed: int = option(0, "Model", "Seed of the engine's own draws (for requests that bring no seed).", low=0)
    max_logprobs: int = option(
        20, "Model", "The most log probabilities that a request may ask for beside each token's own.", low=0, high=1000
    )

    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device", "Where to compute.")
    threads: int = option(
        0, "Device", "CPU threads for the model; 0: one for each physical core, one in all for tiny models.", low=0
    )
    attention_backend: Literal["auto", "cpu", "triton", "flashinfer", "reference"] = option(
        "auto", "Device", "Attention implementation; start-up says why others were passed over."
    )
    kernel_level: Literal["auto", "0", "1", "2", "3"] = option(
        "auto",
        "Device",
        "CPU code to use: 0 plain torch, 1 packed linear layers, 2 C++ kernels, 3 also one C++ call for a whole step.",
    )
    pipeline_depth: Literal["auto", "1", "2"] = option(
        "auto",
        "Device",
        "Steps under way at a time; 'auto': 2 on a GPU, where the next step is planned while one is computed, else 1.",
    )
    enforce_eager: bool = option(
        False, "Device", "Launch every step kernel by kernel, without CUDA graphs of decoding steps (GPU only)."
    )

    block_size: Literal[8, 16, 32, 64] = option(16, "Memory", "Tokens in one KV block.")
    kv_cache_gib: float | None = option(
        None, "Memory", "GiB for the KV cache (default: from free memory, see gpu-memory-utilization).", low=0.0001
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = option(
        "auto",
        "Memory",
        "Type of K and V in the cache; 'auto' is the model's, 'int8' and 'fp8' hold nearly twice as many tokens.",
    )
    kv_host_gib: float | None = option(
        None, "Memory", "GiB of RAM for KV blocks that the cache gives up; on a CPU a quota of it.", low=0.0001
    )
    kv_disk_gib: float | None = option(
        None, "Memory", "GiB on disk for KV blocks, which are there again after a restart.", low=0.0001
    )
    kv_disk_path: str | None = option(None, "Memory", "Directory for kv-disk-gib; one for each engine.")
    kv_tenant_quota: float = option(
        1.0, "Memory", "Share of a tier's blocks above which a tenant loses its own first.", low=0.001, high=1.0
    )
    preemption_mode: Literal["auto", "swap", "recompute"] = option(
        "auto",
        "Memory",
        "What becomes of the blocks of a request that is put back: 'swap' moves them through the tiers, 'recompute' "
        "does without; 'auto' moves blocks wherever that was measured to be faster than computing them.",
    )
    num_kv_blocks: int | None = option(None, "Memory", "Exact number of KV blocks; overrides kv-cache-gib.", low=1)
    gpu_memory_utilization: float | None = option(
        None,
        "Memory",
        "Share of the device's memory for weights and KV cache; on a CPU the share of RAM. "
        "Default: 0.9 on a GPU; on a CPU the KV cache takes half of what is free after loading, at most 4 GiB.",
        low=0.01,
        high=1.0,
    )

    memory_gib: float | None = option(
        None,
        "Memory",
        "GiB for weights, workspace and KV cache together, which then takes all that the others leave (default: what "
        "the device has).",
        low=0.001,
    )

    kv_cache_metrics: bool = option(
        False, "Memory", "Show how long KV blocks keep what they hold, in the metrics vllm:kv_block_*."
    )
    kv_cache_metrics_sample: float = option(
        0.01, "Memory", "Share of KV blocks that kv-cache-metrics follows.", low=0.0001, high=1.0
    )

    preset: Literal["balanced", "latency", "throughput"] = option(
        "balanced", "Scheduling", "A set of settings for those not given themselves; start-up lists them with reasons."
    )
    max_num_seqs: int = option(64, "Scheduling", "Seats: the most requests that run at once.", low=1, high=4096)
    max_num_batched_tokens: int = option(512, "Scheduling", "The most tokens that one step computes.", low=1)
    step_budget_ms: float | None = option(
        None,
        "Scheduling",
        "Milliseconds that prefill may stretch a step to while streams wait for tokens. Default: twice the decoding "
        "rows' own time; 0: no limit but max-num-batched-tokens.",
        low=0,
    )
    batching: Literal["continuous", "static"] = option(
        "continuous", "Scheduling", "'static' admits only when the running batch is empty: the baseline."
    )
    scheduling_policy: Literal[
        "fcfs", "sjf", "hrrn", "prefix", "deadline", "fair", "priority", "priority:sjf", "priority:hrrn",
        "priority:prefix", "priority:deadline", "priority:fair",
    ] = option(
        "priority",
        "Scheduling",
        "Who boards next. 'priority' puts the requests' own priorities before the policy behind the colon (alone: "
        "before fcfs).",
    )  # fmt: skip
    promote_after: float = option(
        30.0, "Scheduling", "Seconds of waiting that lower a priority number by one, so that nobody starves.", low=0.001
    )
    age_cap: float = option(
        10.0, "Scheduling", "Seconds after which sjf and prefix let a request board in order of arrival.", low=0
    )
    fair_quantum: float = option(
        2000.0, "Scheduling", "Virtual tokens by which fair lets tenants differ for cached prefixes; 0: strict.", low=0
    )
    tenant_weights: str | None = option(
        None, "Scheduling", "Tenants' shares under fair, as NAME=WEIGHT by commas (default: 1 each)."
    )
    enable_prefix_caching: bool = option(True, "Scheduling", "Reuse KV blocks of equal prompt beginnings.")
    enable_chunked_prefill: bool = option(
        True, "Scheduling", "Split long prompts over steps; without it a prompt must fit max-num-batched-tokens."
    )
    max_queue: int = option(
        256, "Scheduling", "Waiting requests beyond which newcomers get 503 and a Retry-After.", low=1
    )
    reserved_seats: int = option(
        0, "Scheduling", "Seats that background requests (of urgency MEDIUM and LOW) leave free for others.", low=0
    )
    background_gap_ms: float | None = option(
        None,
        "Scheduling",
        "Milliseconds that a step may last for the sake of background requests while interactive ones stream. Default: "
        "so that the 99th percentile of their gaps hardly grows; 0: no limit.",
        low=0,
    )
    promote_medium_after: float = option(
        120.0, "Scheduling", "Seconds after which a request of urgency MEDIUM counts as interactive.", low=0
    )
    promote_low_after: float = option(
        3600.0, "Scheduling", "Seconds after which a request of urgency LOW counts as interactive.", low=0
    )
    default_priority: int = option(0, "Scheduling", "Priority of requests that name none; lower is served earlier.")

    journal: str | None = option(
        None, "Recorder", "Directory for a record of every scheduling decision, prompts included (mode 0600)."
    )
    journal_mb: int = option(
        256, "Recorder", "Megabytes that the files in the journal's directory may take; the oldest go.", low=1
    )


SHOWN = ("kv_cache_metrics", "kv_cache_metrics_sample")
"""What changes only what a server shows of itself."""

PRESETS: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "latency": (
        "few at a time, each at a steady pace; who would have to wait long hears so at once.",
        {
            "max_num_seqs": (8, "a step is short when few share it"),
            "max_num_batched_tokens": (128, "a prompt stretches nobody's step by more than so many tokens"),
            "scheduling_policy": ("priority:sjf", "a short question does not wait behind long ones"),
            "max_queue": (32, "beyond four times the seats, another server answers sooner"),
        },
    ),
    "throughput": (
        "the most tokens a second; single streams may pause while prompts are computed.",
        {
            "max_num_seqs": (256, "weights are read once for all rows of a step"),
            "max_num_batched_tokens": (2048, "long steps spend the least on what each step costs anyway"),
            "step_budget_ms": (0.0, "prefill does not hold back for running streams"),
            "scheduling_policy": ("priority:prefix", "cached beginnings are used before they are forgotten"),
            "max_queue": (4096, "a long queue keeps the seats taken"),
        },
    ),
}
"""Meaning, values and reasons of each preset; `balanced` is the defaults."""


def preset_values(preset: str | None, given: Collection[str]) -> dict[str, Any]:
    """What a preset sets, except for what was given itself."""
    _, chosen = PRESETS.get(preset or "", ("", {}))
    return {name: value for name, (value, _) in chosen.items() if name not in given}


def preset_notes(engine: EngineConfig, origins: Mapping[str, str]) -> list[str]:
    """Sentences about what the preset of `engine` has set, and why; none for the default one."""
    meaning, chosen = PRESETS.get(engine.preset, ("", {}))
    origin = f"preset {engine.preset}"
    own = [f"{name}={value}: {why}" for name, (value, why) in chosen.items() if origins.get(name) == origin]
    return [f"{origin}: {meaning}", *own] if own else []


def whole_prompts(config: EngineConfig, longest: int) -> EngineConfig:
    """The same for a model whose prompts, of up to `longest` tokens, run whole and leave nothing to be found again."""
    return dataclasses.replace(
        config,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        max_num_batched_tokens=max(config.max_num_batched_tokens, longest),
    )


def weights_of(text: str | None) -> dict[str, float]:
    """`NAME=WEIGHT,...` as numbers. Raises ConfigError."""
    weights = {}
    for part in filter(None, (text or "").split(",")):
        name, _, number = part.rpartition("=")
        try:
            weights[name.strip()] = weight = float(number)
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000 or not name.strip():
            message = f"tenant_weights has {part!r}; each part must be NAME=WEIGHT with a weight from 0.001 to 1000."
            raise ConfigError(message, param="tenant_weights")
    return weights


def check(engine: EngineConfig) -> EngineConfig:
    """Refuse combinations that no single setting can see. Returns the config. Raises ConfigError."""
    weights_of(engine.tenant_weights)
    if (engine.kv_disk_gib is None) != (engine.kv_disk_path is None):
        given, missing = ("gib", "path") if engine.kv_disk_path is None else ("path", "gib")
        raise ConfigError(
            f"kv_disk_{given} is given without kv_disk_{missing}. Give both, or neither.", param=f"kv_disk_{missing}"
        )
    if not engine.enable_prefix_caching and (engine.kv_host_gib or engine.kv_disk_gib):
        raise ConfigError(
            "kv_host_gib and kv_disk_gib keep cached blocks, but prefix caching is off. Leave them out, or do not "
            "switch it off.",
            param="enable_prefix_caching",
        )
    if engine.reserved_seats >= engine.max_num_seqs:
        raise ConfigError(
            f"reserved_seats ({engine.reserved_seats}) leaves none of {engine.max_num_seqs} seats to background "
            "requests, which could never run. Lower it, or raise max_num_seqs.",
            param="reserved_seats",
        )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({engine.max_num_batched_tokens}) is below max_num_seqs ({engine.max_num_seqs}): "
            "a step could not give every running request its token. Raise the first or lower the second.",
            param="max_num_batched_tokens",
        )
    return engine
