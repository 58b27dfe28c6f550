"""Divide a device's memory by what the loaded model was measured to take, not by an estimate.

The largest step that may come is computed once, with made-up tokens, in the two shapes that take the most: all tokens
of `max_num_batched_tokens` with logits for all seats, and one token for each seat, each with as long a context as the
KV cache could hold. What that takes at its peak, the KV cache cannot have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.config import EngineConfig
from ropeway.errors import MemoryBudgetError
from ropeway.modelspec import ModelSpec
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.device_memory import DeviceMemory, asked_for, ran_out
from ropeway.runtime.device_sampler import sample
from ropeway.runtime.graphs import sizes
from ropeway.runtime.memory import GIB, Budget, MemoryState, Needs, cpu_memory, gib, plan_budget
from ropeway.runtime.models.build import Built
from ropeway.runtime.pipeline import obstacle

GRAPH_BYTES = 8 << 20
"""What the driver keeps for each recorded step, beside the memory that all of them share."""
_SPREAD = 7919  # a prime: neighbouring tokens are not alike, so that a mixture of experts uses many of them


class Forward(Protocol):
    """What is asked of a model here."""

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Shape:
    """A step of `tokens` tokens, divided evenly among `rows` rows that begin at position `start`."""

    tokens: int
    rows: int
    start: int


def shapes(config: EngineConfig, longest: int, num_blocks: int) -> tuple[Shape, Shape]:
    """The two steps that take the most memory where no sequence has more than `longest` tokens, nor all of them
    together more than `num_blocks` blocks: one full of prompts, one of nothing but decoding."""
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    context = min(longest, max(1, num_blocks * config.block_size // rows))
    return Shape(min(config.max_num_batched_tokens, rows * longest), rows, 0), Shape(rows, rows, context - 1)


def made_up(shape: Shape, block_size: int, stored: int, vocab: int, device: torch.device) -> BatchInputs:
    """Inputs of a step of `shape`, whose rows all use the same `stored` blocks and want logits of their last token."""
    counts = np.full(shape.rows, shape.tokens // shape.rows)
    counts[: shape.tokens % shape.rows] += 1
    cu_q = np.concatenate([[0], np.cumsum(counts)])
    positions = np.arange(shape.tokens) - np.repeat(cu_q[:-1], counts) + shape.start
    lengths = counts + shape.start
    width = -(-int(lengths.max()) // block_size)
    needed = -(-lengths // block_size)
    tables = np.where(np.arange(width) < needed[:, None], np.arange(width) % stored, -1)

    def to(array: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device)

    return BatchInputs(
        token_ids=to(np.arange(shape.tokens) * _SPREAD % vocab, np.int64),
        positions=to(positions, np.int64),
        cu_q=to(cu_q, np.int32),
        starts=to(np.full(shape.rows, shape.start), np.int32),
        lengths=to(lengths, np.int32),
        block_tables=to(tables, np.int32),
        write_slots=to(positions // block_size % stored * block_size + positions % block_size, np.int32),
        logits_rows=to(cu_q[1:] - 1, np.int64),
        max_count=int(counts.max()),
        max_length=int(lengths.max()),
    )


@dataclass(frozen=True)
class Profile:
    """How to try a step out: the model, the shape of one layer of a KV block, and `sample`, which does with logits what
    the sampler does. `graphs` is the number of steps that will be recorded."""

    model: Forward
    layers: int
    block_shape: Sequence[int]
    kv_dtype: torch.dtype
    device: torch.device
    sample: Callable[[Tensor], object]
    graphs: int = 0

    @torch.inference_mode()
    def run(self, config: EngineConfig, vocab: int, shape: Shape) -> None:
        """Compute a step of `shape`."""
        stored = -(-(shape.start + -(-shape.tokens // shape.rows)) // config.block_size)
        stored = min(stored, max(1, -(-config.max_num_batched_tokens // config.block_size)))
        kv = torch.zeros((stored, self.layers, *self.block_shape), dtype=self.kv_dtype, device=self.device)
        self.sample(self.model.forward(made_up(shape, config.block_size, stored, vocab, self.device), kv))


def measure(
    memory: DeviceMemory,
    before: MemoryState,
    profile: Profile,
    config: EngineConfig,
    vocab: int,
    tried: Sequence[Shape],
) -> Needs:
    """What the loaded model and steps of the shapes `tried` take, where `before` is the state before it was loaded.
    Raises what a step raises, such as torch.OutOfMemoryError."""
    memory.release()
    memory.watch()
    weights = memory.peak()
    peaks = []
    for shape in tried:
        memory.release()
        memory.watch()
        profile.run(config, vocab, shape)
        peaks.append(memory.peak() - weights)
    libraries = max(0, before.free - memory.state().free - memory.held())
    recorded = profile.graphs and peaks[-1] + profile.graphs * GRAPH_BYTES
    return Needs(weights, max(peaks), libraries + recorded, measured=True)


def settle(
    memory: DeviceMemory,
    before: MemoryState,
    estimated: Budget,
    config: EngineConfig,
    spec: ModelSpec,
    dtype: str,
    device: str,
    profile: Profile,
) -> Budget:
    """The budget by measurement, for a model that is loaded on a device of that kind; `estimated` where the device does
    not count its memory. Raises MemoryBudgetError, if steps are too large with a number of tokens that was tried."""
    if not memory.measures or not estimated.kv_bytes:
        return estimated
    refusal: MemoryBudgetError | None = None
    for trial in _smaller(config):
        try:
            tried = shapes(trial, estimated.max_model_len, estimated.num_blocks)
            needs = measure(memory, before, profile, trial, spec.vocab, tried)
            longest = estimated.max_model_len
            budget = plan_budget(trial, spec, dtype, device, before, needs, longest)
        except MemoryBudgetError as error:
            if error.param is not None and refusal is None:
                raise  # it says itself which setting would do
            refusal = refusal or error
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            refusal = refusal or _too_large(error, memory, spec, trial)
        else:
            if refusal is None:
                return dataclasses.replace(budget, notes=(_used(before), *budget.notes))
            raise MemoryBudgetError(f"{refusal} Use {_flags(config, trial)}.", param="max_num_batched_tokens")
    assert refusal is not None
    raise refusal


def _smaller(config: EngineConfig) -> Iterator[EngineConfig]:
    """`config`, then the same with fewer tokens in a step, then with fewer requests too."""
    tokens, rows = config.max_num_batched_tokens, config.max_num_seqs
    while tokens:
        yield dataclasses.replace(config, max_num_batched_tokens=tokens, max_num_seqs=rows)
        tokens = max(tokens // 2, rows) if tokens > rows else tokens // 2
        rows = min(rows, tokens)


def _flags(config: EngineConfig, trial: EngineConfig) -> str:
    fewer = f" with --max-num-seqs {trial.max_num_seqs}" if trial.max_num_seqs < config.max_num_seqs else ""
    return f"--max-num-batched-tokens {trial.max_num_batched_tokens}{fewer}"


def _too_large(error: Exception, memory: DeviceMemory, spec: ModelSpec, config: EngineConfig) -> MemoryBudgetError:
    state = memory.state()
    return MemoryBudgetError(
        f"{spec.name} is loaded, but a step of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} "
        f"requests does not fit beside it: memory ran out{asked_for(error)}, and {gib(state.free)} {state.limit} are "
        "free."
    )


def _used(before: MemoryState) -> str:
    return (
        f"GPU memory: {gib(before.total)}, of which {gib(before.total - before.free)} were in use before anything was "
        "loaded, by other processes and the driver."
    )


def measured(
    memory: DeviceMemory,
    before: MemoryState,
    estimated: Budget,
    config: EngineConfig,
    spec: ModelSpec,
    dtype: str,
    built: Built,
) -> Budget:
    """The budget for `built`, a model that was loaded where `before` is how it was (see `settle`)."""
    if memory.measures:
        check_host(config, cpu_memory())
    profile = Profile(
        model=built.model,
        layers=spec.layers,
        block_shape=built.backend.block_shape(),
        kv_dtype=built.attention.kv_dtype,
        device=built.model.device,
        sample=choose_tokens,
        graphs=0 if obstacle(built, config) else len(sizes(config.max_num_seqs)),
    )
    return settle(memory, before, estimated, config, spec, dtype, built.model.device.type, profile)


def choose_tokens(logits: Tensor) -> Tensor:
    """A token for each row of `logits` (R, vocab), chosen in the way that takes the most memory."""

    def each(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)

    return sample(logits, each(1.0), each(40, torch.int64), each(0.9), each(0.0), each(0.5))


def check_host(config: EngineConfig, memory: MemoryState) -> None:
    """Raises MemoryBudgetError unless the host tier, which a GPU needs pinned, and so all at once, fits the RAM."""
    wanted = (config.kv_host_gib or 0) * GIB
    if wanted > memory.free:
        raise MemoryBudgetError(
            f"kv_host_gib is {config.kv_host_gib}, but {gib(memory.free)} {memory.limit} are free. "
            f"Use --kv-host-gib {int(memory.free / GIB * 900) / 1000} or less.",
            param="kv_host_gib",
        )
