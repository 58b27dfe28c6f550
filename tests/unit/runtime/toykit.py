"""A runner without weights: a model whose next token tells of every token that it finds in a row's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropeway.contract import Admit, Row, SamplingParams, StepPlan
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.device_memory import DeviceMemory
from ropeway.runtime.device_sampler import sample
from ropeway.runtime.graphs import Graphs
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.lane import CpuLane, Lane
from ropeway.runtime.ondevice import DeviceTokens
from ropeway.runtime.runner import Runner
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.slots import Slots

VOCAB, BLOCK, LONGEST = 97, 4, 32
GREEDY = SamplingParams(temperature=0.0)


class Toy:
    """The KV cell of a position holds its token. The next token is a sum of all tokens, each times its place."""

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        cells = kv.view(kv.shape[0] * BLOCK)
        cells[inputs.write_slots.long()] = inputs.token_ids.float()
        states = torch.zeros((len(inputs.logits_rows), 2))
        for place, at in enumerate(inputs.logits_rows.tolist()):
            row = int((inputs.cu_q[1:] <= at).sum())
            length = int(inputs.positions[at]) + 1
            assert length <= int(inputs.lengths[row])
            places = torch.arange(length)
            tokens = cells[inputs.block_tables[row].long()[places // BLOCK] * BLOCK + places % BLOCK]
            states[place, 0] = (tokens * (places + 1)).sum() % VOCAB
            states[place, 1] = inputs.positions[at]
        return states

    def logits(self, states: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(states[:, 0].long(), VOCAB).float() * 9

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        return self.logits(self.hidden(inputs, kv))


def expected(tokens: Sequence[int], number: int) -> list[int]:
    """What `Toy` says after `tokens`."""
    known = list(tokens)
    for _ in range(number):
        known.append(sum(token * place for place, token in enumerate(known, 1)) % VOCAB)
    return known[len(tokens) :]


class Plain:
    """Ops for a sampler in plain torch."""

    name = "torch"


def runner(model: Any = None, *, slots: int = 6, blocks: int = 60, lane: Lane | None = None, recorded: bool = False,
           memory: DeviceMemory | None = None) -> Runner:  # fmt: skip
    lane = lane or CpuLane()
    kv = KVStore(blocks, 1, (BLOCK,), torch.float32, torch.device("cpu"))
    seats = Slots(slots, LONGEST, BLOCK, blocks, VOCAB)
    tokens = DeviceTokens(seats, lane, sample)
    made = Runner(model or Toy(), kv, seats, Sampler(Plain()), lane, 0, tokens=tokens, memory=memory)  # type: ignore[arg-type]
    if recorded:
        made.graphs = Graphs(made.model, kv, tokens, lane, slots, 2, torch.float32)
    return made


def seat(slot: int, tokens: Sequence[int], sampling: SamplingParams = GREEDY, *, rid: int = -1) -> Admit:
    """A sequence in the blocks 8 * slot and following."""
    return Admit(slot if rid < 0 else rid, 0, slot, list(tokens), len(tokens), 0, own(slot), sampling, ())


def own(slot: int) -> list[int]:
    return list(range(8 * slot, 8 * slot + LONGEST // BLOCK))


def row(slot: int, start: int, count: int = 1, *, emit: bool = True, rid: int = -1) -> Row:
    return Row(slot if rid < 0 else rid, 0, slot, start, count, emit, [])


def plan(rows: Sequence[Row], admit: Sequence[Admit] = (), release: Sequence[int] = ()) -> StepPlan:
    return StepPlan(0, list(release), list(admit), list(rows), [])
