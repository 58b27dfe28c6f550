"""Small worlds for tests of the simulator."""

from __future__ import annotations

from ropeway.config import EngineConfig
from ropeway.sim.cost import CostModel
from ropeway.sim.profile import Profile, Serving


def small_profile(*, serving: Serving | None = None, **changes: object) -> Profile:
    """A slow little machine with round numbers: 10 ms a step, 1 ms a token."""
    fields: dict[str, object] = {
        "name": "small", "model": "none", "machine": "a test", "basis": "measured",
        "cost": CostModel(base=0.01, per_token=0.001), "serving": serving or Serving(), "kv_tokens": 4096,
        "kv_token_bytes": 64, "max_model_len": 1024, "vocab_size": 1000,
    }  # fmt: skip
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def small_config(**changes: object) -> EngineConfig:
    fields: dict[str, object] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_queue": 10_000}
    return EngineConfig(**{**fields, **changes})  # type: ignore[arg-type]
