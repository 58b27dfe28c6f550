"""Settings of a simulation, beside those of the engine that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropeway.config.option import option
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.sim.report import Targets

OBEYED = (
    "max_model_len", "block_size", "kv_cache_gib", "kv_host_gib", "kv_tenant_quota", "preemption_mode", "num_kv_blocks",
    "max_num_seqs", "max_num_batched_tokens", "step_budget_ms", "batching", "scheduling_policy", "promote_after",
    "age_cap", "fair_quantum", "tenant_weights", "enable_prefix_caching", "enable_chunked_prefill", "max_queue",
    "reserved_seats", "background_gap_ms", "promote_medium_after", "promote_low_after",
)  # fmt: skip
"""The engine's settings that a simulation obeys: those of scheduling and memory."""


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """Which traffic, on what, and what is wanted of it."""

    workload: Literal["azure-conv", "azure-code", "burstgpt", "sharegpt", "sessions", "poisson", "uniform"] = option(
        "poisson", "Traffic", "Synthetic requests: equal ones, or with the shape of a published trace."
    )
    trace: str | None = option(
        None, "Traffic", "File of recorded requests instead: Azure CSV, Mooncake JSONL, or JSONL (see docs)."
    )
    num_requests: int | None = option(
        None, "Traffic", "How many requests (default: 1000, or all of the trace).", low=1, high=10_000_000
    )
    rate: float | None = option(None, "Traffic", "Requests per second, on average.", low=1e-6)
    load: float | None = option(
        None,
        "Traffic",
        "Rate as a share of what the machines can do at most, which is found by simulation (default: 0.8, but a trace "
        "keeps its own times).",
        low=0.001,
        high=100,
    )
    rate_scale: float = option(1.0, "Traffic", "Factor on the rate.", low=1e-6)
    length_scale: float = option(1.0, "Traffic", "Factor on all lengths, to fit a trace to a small model.", low=1e-6)
    input_len: int = option(128, "Traffic", "Prompt tokens of each request of poisson and uniform.", low=1)
    output_len: int = option(64, "Traffic", "Answer tokens of each request of poisson and uniform.", low=1)
    max_tokens: int | None = option(
        None,
        "Traffic",
        "What clients allow for an answer; how long it gets, the scheduler does not know then (default: the answer's "
        "own length, which it knows).",
        low=1,
    )
    tenants: int = option(
        1, "Traffic", "Tenants who share the synthetic traffic; the n-th sends 1/n of the first.", low=1
    )
    seed: int = option(0, "Traffic", "Seed of the synthetic traffic.", low=0)
    backlog: bool = option(
        False, "Traffic", "Beside the traffic an endless backlog of such requests as background work of urgency LOW."
    )

    profile: str = option("laptop-cpu", "Machine", "What a step costs: a shipped profile, or a file of `calibrate`.")
    replicas: int = option(1, "Machine", "Equal servers behind a balancer.", low=1, high=1000)
    balance: Literal["least-loaded", "round-robin"] = option(
        "least-loaded", "Machine", "Which replica gets a request: the one with the fewest, or one after the other."
    )
    price_per_hour: float | None = option(
        None, "Machine", "Cost of one replica for an hour, in any currency (default: the profile's).", low=0
    )

    ttft_target_ms: float = option(
        2000.0, "Targets", "Milliseconds to the first token; requests ask for it as their deadline.", low=0.001
    )
    gap_target_ms: float = option(200.0, "Targets", "Milliseconds per token after it, on average.", low=0)
    attain: float = option(0.99, "Targets", "Share of requests that must meet both.", low=0, high=1)

    @property
    def targets(self) -> Targets:
        from ropeway.sim.report import Targets  # late: `ropeway --help` does without

        return Targets(self.ttft_target_ms / 1000, self.gap_target_ms / 1000)


def check(config: SimConfig) -> SimConfig:
    """Refuse what no single setting can see. Returns the config. Raises ConfigError."""
    if config.rate is not None and config.load is not None:
        raise ConfigError("--rate and --load both say how fast requests come. Give one.", param="load")
    if config.trace is not None:
        if not Path(config.trace).exists():
            raise ConfigError(f"There is no trace {config.trace}. Check --trace.", param="trace")
        if config.tenants > 1:
            raise ConfigError("A trace names its own tenants. Leave out --tenants.", param="tenants")
    return config
