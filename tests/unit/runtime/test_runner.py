"""Plans carried out to the letter, and faults that stay with the row that has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import prompt
from driver import GREEDY, Driver, Line
from ropeway.config import EngineConfig
from ropeway.contract import Admit, BlockCopy, Row, SamplingParams, StepPlan
from ropeway.errors import EngineError
from ropeway.runtime.gather import gather
from ropeway.runtime.lane import CpuLane
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.slots import Slots

Make = Callable[[str], Path]
NUMBER = 12
RANDOM = SamplingParams(temperature=0.9, top_p=0.95, seed=5, frequency_penalty=0.2)


def driver(directory: Path, **options: Any) -> Driver:
    settings = {"num_kv_blocks": 60, "block_size": 8, "max_num_seqs": 8, "threads": 1, "dtype": "float32",
                "max_model_len": 96, **options}  # fmt: skip
    return Driver(LocalExecutor(EngineConfig(model=str(directory), **settings)))


def crowd(d: Driver) -> list[Line]:
    return [d.add(prompt(i, 9 + 7 * i), RANDOM if i % 2 else GREEDY) for i in range(5)]


def outputs(directory: Path) -> list[list[int]]:
    d = driver(directory)
    lines = crowd(d)
    d.run(lines, NUMBER, chunk=6)
    return [line.output for line in lines]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_in_one_sequence_leaves_the_others_untouched(checkpoint: Make, backend: str) -> None:
    """One sequence's cached keys turn to NaN; then another takes its blocks and must not feel it."""
    directory = checkpoint("llama")
    d = driver(directory, attention_backend=backend)
    lines = crowd(d)
    d.run(lines, 4, chunk=6)
    d.executor.runner.kv.data[lines[2].blocks] = torch.nan
    d.run(lines, NUMBER, chunk=6)
    clean = driver(directory, attention_backend=backend)
    expected = crowd(clean)
    clean.run(expected, NUMBER, chunk=6)
    for i, (line, same) in enumerate(zip(lines, expected, strict=True)):
        if i == 2:
            assert line.fault is not None
            assert line.fault.code == "RW-NAN"
            assert line.output == same.output[: len(line.output)]
        else:
            assert line.fault is None
            assert line.output == same.output
    poisoned = lines[2].blocks
    d.remove(lines[2])
    heir = d.add(prompt(2, 23))
    d.run([heir], NUMBER, chunk=6)
    assert set(poisoned) <= set(heir.blocks)
    assert heir.fault is None
    assert heir.output == expected[2].output


class Bomb:
    """A model that cannot compute a batch with a certain token in it."""

    def __init__(self, model: Any, token: int) -> None:
        self.model, self.token, self.calls = model, token, 0

    def forward(self, inputs: Any, kv: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if (inputs.token_ids == self.token).any():
            # The keys and values are written before it fails, as they would be by a fault in a late layer.
            self.model.forward(inputs, kv)
            raise RuntimeError("bomb")
        return self.model.forward(inputs, kv)


def test_an_exception_in_the_forward_pass_is_pinned_to_its_row(checkpoint: Make) -> None:
    directory = checkpoint("qwen3")
    expected = outputs(directory)
    d = driver(directory)
    lines = crowd(d)
    harmless = {token for line in lines for token in line.tokens} | {token for out in expected for token in out}
    token = min(set(range(300)) - harmless)
    bomb = d.executor.runner.model = Bomb(d.executor.runner.model, token)
    victim = d.add([5, 6, token, 7])
    d.run([lines[0], victim, *lines[1:]], NUMBER, chunk=6)
    assert victim.fault is not None
    assert victim.fault.code == "RW-ENGINE"
    assert "RuntimeError: bomb" in victim.fault.message
    assert [line.output for line in lines] == expected
    assert bomb.calls < d.steps + 8


def test_an_exception_in_sampling_is_pinned_to_its_row(checkpoint: Make) -> None:
    directory = checkpoint("llama")
    expected = outputs(directory)
    d = driver(directory)
    lines = crowd(d)
    victim = d.add(prompt(9, 9), SamplingParams(logit_bias={9999: 1.0}))
    d.run([*lines, victim], NUMBER, chunk=6)
    assert victim.fault is not None
    assert victim.fault.code == "RW-REQ"
    assert [line.output for line in lines] == expected


class Spy:
    """A model whose head computes few positions at a time, and NaN for a sequence that begins with a certain token."""

    def __init__(self, model: Any, token: int) -> None:
        self.model, self.token, self.rows = model, token, list[int]()

    def forward(self, inputs: Any, kv: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(inputs, kv))

    def hidden(self, inputs: Any, kv: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model.hidden(inputs, kv)
        spoilt = inputs.cu_q[:-1][inputs.token_ids[inputs.cu_q[:-1].long()] == self.token]
        states[(inputs.logits_rows[:, None] == spoilt).any(dim=1)] = torch.nan
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(states))
        return self.model.logits(states)


def test_prompts_are_rated_in_pieces_and_a_fault_in_one_stays_there(checkpoint: Make) -> None:
    directory = checkpoint("llama")
    expected = outputs(directory)
    d = driver(directory, max_num_seqs=7)
    lines = crowd(d)
    told = d.add(prompt(3, 50), SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=0))
    token = min(set(range(300)) - {token for line in [*lines, told] for token in line.tokens})
    victim = d.add([token, *prompt(4, 20)], SamplingParams(temperature=0.0, prompt_logprobs=0))
    spy = d.executor.runner.model = Spy(d.executor.runner.model, token)
    extras = []
    while any(len(line.output) < NUMBER for line in [*lines, told]):
        open_lines = [line for line in [*lines, told, victim] if len(line.output) < NUMBER and line.fault is None]
        extras += d.step([(line, 30) for line in open_lines]).extras
    assert max(spy.rows) <= 16
    assert victim.fault is not None
    assert victim.fault.code == "RW-NAN"
    assert [line.output for line in lines] == expected
    assert {extra.rid for extra in extras} == {told.rid}
    rated = [one for extra in extras for one in extra.prompt_logprobs]
    assert [one.token for one in rated] == told.tokens[1:50]
    assert [extra.prompt_at for extra in extras if extra.prompt_logprobs] == [1, 31]
    assert [one.token for extra in extras for one in extra.logprobs] == told.output
    assert {one.rank for extra in extras for one in extra.logprobs} == {1}  # it is greedy


@pytest.mark.parametrize("tokens", [[5, 300], [-1, 5], []])
def test_a_sequence_that_cannot_be_seated_fails_alone(checkpoint: Make, tokens: list[int]) -> None:
    d = driver(checkpoint("llama"))
    good = d.add(prompt(1, 5))
    plan = StepPlan(
        0,
        [],
        [*d.admit, Admit(77, 0, 7, tokens, len(tokens), 0, [], GREEDY, ())],
        [Row(77, 0, 7, 0, max(len(tokens), 1), True, [50]), Row(good.rid, 0, good.slot, 0, 5, True, [0])],
        [],
    )
    result = d.executor.collect(d.executor.submit(plan))
    assert [f.row for f in result.faults] == [0]
    assert result.tokens[0] == []
    assert len(result.tokens[1]) == 1


def test_rows_that_contradict_their_slot_are_faults(checkpoint: Make) -> None:
    d = driver(checkpoint("llama"))
    line = d.add(prompt(1, 5))
    d.step([(line, 5)])
    slot, known = line.slot, len(line.tokens)
    wrong = [
        Row(line.rid, 1, slot, 5, 1, True, []),
        Row(line.rid + 1, 0, slot, 5, 1, True, []),
        Row(line.rid, 0, slot + 1, 5, 1, True, []),
        Row(line.rid, 0, slot, 5, known, True, []),
        Row(line.rid, 0, slot, 5, 0, True, []),
        Row(line.rid, 0, slot, 5, 1, True, [60]),
    ]
    for row in wrong:
        result = d.executor.runner.step(StepPlan(1, [], [], [row], []))
        assert [(f.row, f.code) for f in result.faults] == [(0, "RW-ENGINE")]


def test_blocks_are_copied_before_the_rows(checkpoint: Make) -> None:
    """A sequence forked onto copies of another's blocks goes on as the other does."""
    directory = checkpoint("llama")
    d = driver(directory)
    line = d.add(prompt(1, 20))
    d.run([line], 4)
    fork = Admit(50, 0, 6, line.tokens[:-1], 20, line.computed - 1, [55, 56, 57], GREEDY, ())
    copies = [BlockCopy(source, target) for source, target in zip(line.blocks, (55, 56, 57), strict=True)]
    start = line.computed - 1
    result = d.executor.runner.step(StepPlan(9, [], [fork], [Row(50, 0, 6, start, 1, True, [])], copies))
    assert result.tokens == [[line.tokens[-1]]]
    with pytest.raises(EngineError, match="'host'"):
        d.executor.submit(StepPlan(10, [], [], [], [BlockCopy(0, 1, "host", "device")]))


def test_seeded_text_does_not_depend_on_the_batch_or_on_preemption(checkpoint: Make) -> None:
    directory = checkpoint("qwen2")
    sampling = SamplingParams(temperature=1.0, top_k=40, seed=42, repetition_penalty=1.2, presence_penalty=0.3)
    d = driver(directory)
    alone = d.add(prompt(3, 30), sampling)
    d.run([alone], NUMBER)
    d = driver(directory)
    lines = [d.add(prompt(3, 30), sampling), *crowd(d)]
    d.run(lines, 5, chunk=4)
    d.remove(lines[0])
    d.run(lines[1:], 8)
    d.readmit(lines[0])
    d.run(lines, NUMBER, chunk=7)
    assert lines[0].output == alone.output
    d = driver(directory)
    other = d.add(prompt(3, 30), SamplingParams(temperature=1.0, top_k=40, seed=43))
    d.run([other], NUMBER)
    assert other.output != alone.output


def test_requests_without_a_seed_follow_the_engines(checkpoint: Make) -> None:
    def run(seed: int) -> list[list[int]]:
        d = driver(checkpoint("llama"), seed=seed)
        lines = [d.add(prompt(1, 9), SamplingParams()) for _ in range(3)]
        d.run(lines, NUMBER)
        return [line.output for line in lines]

    first = run(1)
    assert first == run(1)
    assert first != run(2)
    assert len({tuple(output) for output in first}) == 3


def test_min_tokens_masks_the_end_tokens(checkpoint: Make) -> None:
    d = driver(checkpoint("llama"))
    sampling = SamplingParams(temperature=0.0, min_tokens=4, stop_token_ids=(9,), logit_bias={2: 500.0, 9: 499.0})
    line = d.add(prompt(1, 9), sampling)
    d.run([line], 6)
    assert not {2, 9} & set(line.output[:4])
    assert line.output[4:] == [2, 2]


def test_the_last_token_of_a_full_sequence(checkpoint: Make) -> None:
    d = driver(checkpoint("llama"), max_model_len=24)
    line = d.add(prompt(1, 24))
    d.step([(line, 24)])
    assert len(line.output) == 1
    assert d.executor.runner.slots.sequence(line.slot).tolist() == line.tokens


def test_gathering() -> None:
    """Rows in any order of slots, across block borders, with the padding that the contract names."""
    slots = Slots(max_slots=4, max_model_len=20, block_size=4, num_blocks=30, vocab=100)
    slots.admit(Admit(1, 0, 3, list(range(10, 20)), 10, 4, [7, 2, 9], GREEDY, ()), 0)
    slots.admit(Admit(2, 0, 0, [50, 51], 2, 0, [4], GREEDY, ()), 0)
    rows = [Row(1, 0, 3, 3, 6, False, []), Row(2, 0, 0, 0, 2, True, [])]
    for row in rows:
        slots.extend(row)
    found = gather(rows, slots, CpuLane())
    assert found.token_ids.tolist() == [13, 14, 15, 16, 17, 18, 50, 51]
    assert found.positions.tolist() == [3, 4, 5, 6, 7, 8, 0, 1]
    assert found.cu_q.tolist() == [0, 6, 8]
    assert found.starts.tolist() == [3, 0]
    assert found.lengths.tolist() == [9, 2]
    assert found.block_tables.tolist() == [[7, 2, 9], [4, -1, -1]]
    assert found.write_slots.tolist() == [31, 8, 9, 10, 11, 36, 16, 17]
    assert found.logits_rows.tolist() == [7]
    assert (found.max_count, found.max_length) == (6, 9)
    assert found.token_ids.dtype == found.positions.dtype == found.logits_rows.dtype == torch.int64
    for tensor in (found.cu_q, found.starts, found.lengths, found.block_tables, found.write_slots):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    slots.append(0, 99)
    assert np.array_equal(slots.sequence(0), [50, 51, 99])
