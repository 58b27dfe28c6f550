"""What a simulation must know of a machine with a model: a file, measured by `ropeway calibrate` or estimated."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo
from ropeway.contract.result import Tier
from ropeway.errors import ConfigError
from ropeway.sim.cost import CostModel

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a server adds to its executor, in seconds.

    On the way in: the service (HTTP, tokenizer) is one process that works for `request`, and for `prompt_token` for
    each token of a prompt, on one request after the other; `arrive` later the engine hears of it, and `arrive_busy`
    later yet while it is at work, for then the service is too.

    In the engine: `step` and `row` for each row that yielded a token lie between two steps, and `join` for each request
    that came in meanwhile. An engine that has nothing to do needs `wake` to begin with the first request.
    `jitter` is how much longer (or shorter) a step is than all of this says: the middles of equally large parts of what
    was measured, in order of size, of steps in which all rows decode and of steps that read prompts.

    On the way out: a client has a token `deliver`, and `deliver_row` for each token of the step, after the step's end,
    while the engine goes on. `deliver_jitter` is by how much more or less that is of first and last tokens, in parts as
    `jitter` is: what delays several tokens of an answer alike leaves the gaps between them as they are.
    """

    request: float = 0.0
    prompt_token: float = 0.0
    arrive: float = 0.0
    arrive_busy: float = 0.0
    wake: float = 0.0
    step: float = 0.0
    row: float = 0.0
    join: float = 0.0
    deliver: float = 0.0
    deliver_row: float = 0.0
    jitter: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    deliver_jitter: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """`basis` tells whether `cost` was measured or follows from data sheets; `kv_token_bytes` is K and V of one token,
    `kv_tokens` what the cache holds unless told otherwise, `copy_rates` the bytes per second between it and each tier
    beneath. `fit_error` is the relative error of `cost` on the steps that it was fitted to: median and 90th percentile.
    """

    name: str
    model: str
    machine: str
    basis: Literal["measured", "estimate"]
    note: str = ""
    date: str = ""
    cost: CostModel
    serving: Serving = field(default_factory=Serving)
    kv_tokens: int
    kv_token_bytes: int
    max_model_len: int
    vocab_size: int
    copy_rates: dict[str, float] = field(default_factory=dict)
    threads: int = 0
    price_per_hour: float | None = None
    fit_error: tuple[float, float] | None = None

    def __str__(self) -> str:
        what = "measured" if self.basis == "measured" else "ESTIMATE from data sheets, not measured"
        return f"{self.name}: {self.model} on {self.machine} ({what})"

    def copy_seconds(self, config: EngineConfig) -> dict[str, float]:
        """Seconds in which a KV block moves, by tier."""
        return {tier: self.kv_token_bytes * config.block_size / rate for tier, rate in self.copy_rates.items()}

    def executor_info(self, config: EngineConfig) -> ExecutorInfo:
        """What such a machine offers under `config`. Raises ConfigError if its cache would hold no block."""
        kv_bytes = self.kv_token_bytes * config.block_size
        if config.num_kv_blocks is not None:
            blocks = config.num_kv_blocks
        elif config.kv_cache_gib is not None:
            blocks = int(config.kv_cache_gib * GIB / kv_bytes)
        else:
            blocks = self.kv_tokens // config.block_size
        if blocks < 1:
            raise ConfigError(
                f"A KV cache of {config.kv_cache_gib} GiB is smaller than one block of {kv_bytes} bytes. "
                "Raise --kv-cache-gib.",
                param="kv_cache_gib",
            )
        tiers = []
        if config.kv_host_gib is not None:
            if "host" not in self.copy_rates:
                raise ConfigError(
                    f"{self.name} does not say how fast blocks move to RAM and back. Leave out --kv-host-gib, or take "
                    "a profile with a copy rate.",
                    param="kv_host_gib",
                )
            tiers = [Tier("host", int(config.kv_host_gib * GIB / kv_bytes))]
        return ExecutorInfo(
            model=self.model, device="sim", dtype="none", num_blocks=blocks, block_size=config.block_size,
            max_slots=config.max_num_seqs, max_model_len=config.max_model_len or self.max_model_len,
            vocab_size=self.vocab_size, kv_bytes=blocks * kv_bytes, attention="none", notes=[str(self)], tiers=tiers,
        )  # fmt: skip


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    files = resources.files("ropeway.sim").joinpath("profiles").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """A profile by the name of a shipped one, or from a file. Raises ConfigError."""
    path = Path(name)
    try:
        if name in shipped():
            data = resources.files("ropeway.sim").joinpath("profiles", f"{name}.json").read_bytes()
        else:
            data = path.read_bytes()
        return msgspec.json.decode(data, type=Profile)
    except OSError as error:
        raise ConfigError(
            f"The profile {name} cannot be read: {error.strerror}. Take one of {', '.join(shipped())}, or measure one "
            "with `ropeway calibrate MODEL`.",
            param="profile",
        ) from None
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{name} is no profile: {error}. Make one with `ropeway calibrate`.", param="profile"
        ) from None


def save_profile(profile: Profile, path: Path) -> None:
    """Raises OSError."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
