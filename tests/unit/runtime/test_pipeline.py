"""Two halves of a step, several steps open, and what they share."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toykit import GREEDY, VOCAB, Toy, expected, plan, row, runner, seat

from native import needs_native
from ropeway.config import EngineConfig
from ropeway.contract import SamplingParams
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.device_memory import CpuMemory
from ropeway.runtime.device_sampler import sample
from ropeway.runtime.graphs import Background
from ropeway.runtime.lane import CpuLane, Fetch
from ropeway.runtime.ondevice import alone
from ropeway.runtime.pipeline import choose_depth, obstacle, record_steps
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.ticket import Ticket


def test_a_step_begins_before_the_host_knows_the_last_ones_tokens() -> None:
    """At any depth, though nothing is finished until all have begun."""
    made = runner()
    tickets = [made.begin(plan([row(0, 0, 3), row(1, 0, 2)], [seat(0, [5, 6, 7]), seat(1, [8, 9])]))]
    for at in range(4):
        tickets.append(made.begin(plan([row(1, 2 + at), row(0, 3 + at)])))
        assert made.slots.tokens[0, 3 + at] == -1
        assert made.slots.tokens[1, 2 + at] == -2
    results = [made.finish(ticket).tokens for ticket in tickets]
    assert [found[bool(number)] for number, found in enumerate(results)] == [[t] for t in expected([5, 6, 7], 5)]
    assert [found[not number] for number, found in enumerate(results)] == [[t] for t in expected([8, 9], 5)]
    assert made.slots.sequence(0).tolist() == [5, 6, 7, *expected([5, 6, 7], 5)]


def test_a_seat_changes_hands_while_its_token_is_on_the_way() -> None:
    """The heir's tokens are not overwritten, and the old token is told to whoever asked."""
    made = runner()
    first = made.begin(plan([row(0, 0, 3)], [seat(0, [5, 6, 7])]))
    late = made.begin(plan([row(0, 3)]))
    heir = made.begin(plan([row(0, 0, 4, rid=9)], [seat(0, [1, 2, 3, 4], rid=9)], [0]))
    after = made.begin(plan([row(0, 4, rid=9)]))
    old, new = expected([5, 6, 7], 2), expected([1, 2, 3, 4], 2)
    assert [made.finish(ticket).tokens for ticket in (first, late, heir, after)] == [[[t]] for t in [*old, *new]]
    assert made.slots.sequence(0).tolist() == [1, 2, 3, 4, *new]


def test_the_host_catches_up_where_it_has_to_choose() -> None:
    """Random plans at depth 3 for sequences of both kinds: the host's rows have all their tokens, and a step without
    such rows waits for nobody."""
    dice = random.Random(5)
    made = runner()
    banned = SamplingParams(temperature=0.0, repetition_penalty=1.0, bad_word_ids=((VOCAB - 1,),))
    prompts = {slot: [slot + 1, 2 * slot, 3] for slot in range(6)}
    admit = [seat(slot, tokens, banned if slot % 3 == 0 else GREEDY) for slot, tokens in prompts.items()]
    known = dict.fromkeys(prompts, 4)
    found: dict[int, list[int]] = {slot: [] for slot in prompts}
    tickets: list[tuple[list[int], Ticket]] = [([*prompts], made.begin(plan([row(s, 0, 3) for s in prompts], admit)))]
    waited = 0

    def collect() -> None:
        order, ticket = tickets.pop(0)
        for slot, tokens in zip(order, made.finish(ticket).tokens, strict=True):
            found[slot] += tokens

    while min(known.values()) < 20:
        if len(tickets) == 3:
            collect()
        order = dice.sample(sorted(prompts), dice.randint(1, 4))
        host = any(slot % 3 == 0 for slot in order)
        settled = [ticket.settled for _, ticket in tickets]
        before = any(slot % 3 == 0 for slots, ticket in tickets if not ticket.settled for slot in slots)
        if max(known[slot] for slot in order) > 30:
            break
        tickets.append((order, made.begin(plan([row(slot, known[slot] - 1) for slot in order]))))
        now = [ticket.settled for _, ticket in tickets[:-1]]
        assert all(now) if host or before else now == settled
        waited += now != settled
        for slot in order:
            known[slot] += 1
    while tickets:
        collect()
    assert waited > 3
    for slot, tokens in prompts.items():
        right = expected(tokens, len(found[slot]))
        usable = right.index(VOCAB - 1) if VOCAB - 1 in right and slot % 3 == 0 else len(right)
        assert found[slot][:usable] == right[:usable]


class Sick(Toy):
    """NaN for rows that compute a certain token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def hidden(self, inputs: BatchInputs, kv: torch.Tensor) -> torch.Tensor:
        states = super().hidden(inputs, kv)
        states[inputs.token_ids[inputs.logits_rows] == self.token, 1] = torch.nan
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return super().logits(states).masked_fill(states[:, 1:].isnan(), torch.nan)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_token_that_cannot_be_chosen_is_a_fault_of_its_row(recorded: bool) -> None:
    prompts = [[5, 6, 7], [8, 9, 1]]
    answers = [expected(tokens, 4) for tokens in prompts]
    assert answers[0][1] not in {*answers[0][2:], *answers[1], answers[0][0], 7, 1}
    made = runner(Sick(answers[0][1]), recorded=recorded)
    while made.capture():
        pass
    tickets = [made.begin(plan([row(s, 0, 3) for s in (0, 1)], [seat(s, prompts[s]) for s in (0, 1)]))]
    tickets += [made.begin(plan([row(s, at) for s in (0, 1)])) for at in range(3, 6)]
    results = [made.finish(ticket) for ticket in tickets]
    assert [result.tokens[1] for result in results] == [[token] for token in answers[1]]
    assert [result.tokens[0] for result in results[:2]] == [[token] for token in answers[0][:2]]
    assert [(fault.row, fault.code) for fault in results[2].faults] == [(0, "RW-NAN")]
    assert all(fault.row == 0 for fault in results[3].faults)
    late = made.step(plan([row(0, 6)]))
    assert "no token could be chosen" in late.faults[0].message


class Scarce(Toy):
    """Runs out of memory with more than two rows, or with a certain token."""

    def __init__(self, token: int = -1) -> None:
        self.token = token

    def hidden(self, inputs: BatchInputs, kv: torch.Tensor) -> torch.Tensor:
        if inputs.num_rows > 2 or (inputs.token_ids == self.token).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().hidden(inputs, kv)


class Purse(CpuMemory):
    released = 0

    def release(self) -> None:
        self.released += 1


def test_a_step_for_which_memory_runs_out_is_computed_in_parts() -> None:
    memory = Purse()
    made = runner(Scarce(77), memory=memory)
    prompts = [[slot + 1, slot + 2] for slot in range(5)] + [[76, 77]]
    result = made.step(
        plan([row(slot, 0, 2) for slot in range(6)], [seat(slot, tokens) for slot, tokens in enumerate(prompts)])
    )
    assert result.tokens == [*[expected(tokens, 1) for tokens in prompts[:5]], []]
    assert [fault.row for fault in result.faults] == [5]
    assert "Memory ran out when 2.00 GiB more were wanted" in result.faults[0].message
    assert memory.released >= 3


class Deaf(CpuLane):
    """Cannot bring back more than two tokens at a time, while `fails`."""

    fails = False

    def fetch(self, tensor: torch.Tensor) -> Fetch:
        if self.fails and tensor.numel() > 2:
            raise RuntimeError("no pinned memory")
        return super().fetch(tensor)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_is_repeated_on_the_tokens_that_it_had(recorded: bool) -> None:
    """Although its first attempt has chosen the next ones, while those that it began with were on the way."""
    lane = Deaf()
    made = runner(lane=lane, recorded=recorded)
    while made.capture():
        pass
    prompts = [[slot + 5, slot + 6] for slot in range(5)]
    first = made.begin(plan([row(s, 0, 2) for s in range(5)], [seat(s, tokens) for s, tokens in enumerate(prompts)]))
    lane.fails = True
    tickets = [first, *(made.begin(plan([row(s, at) for s in range(5)])) for at in (2, 3))]
    results = [made.finish(ticket) for ticket in tickets]
    assert [result.faults for result in results] == [[], [], []]
    for slot, tokens in enumerate(prompts):
        assert [result.tokens[slot] for result in results] == [[token] for token in expected(tokens, 3)]


def test_a_lost_device_is_no_rows_fault() -> None:
    """The process has to end, so that another one takes its place."""

    class Lost(CpuLane):
        def check(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    made = runner(Scarce(), lane=Lost())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made.begin(plan([row(slot, 0, 2) for slot in range(3)], [seat(slot, [1, 2]) for slot in range(3)]))


class Clockwork(CpuLane):
    """Marks that a test has written down."""

    def __init__(self, marks: list[float]) -> None:
        super().__init__()
        self.marks = marks

    def mark(self) -> float:
        return self.marks.pop(0)


def test_seconds_and_pauses_are_the_devices() -> None:
    """Each step has three marks. A pause counts if somebody was on board all the while."""
    made = runner(lane=Clockwork([0, 1, 10, 12, 13, 20, 100, 101, 110]))
    first = made.begin(plan([row(0, 0, 2)], [seat(0, [1, 2])]))
    second = made.begin(plan([row(0, 2)]))
    assert 10 <= made.finish(first).seconds < 11
    assert 8 <= made.finish(second).seconds < 9
    assert made.pace.idle == 3  # from 10 to 13
    made.step(plan([row(1, 0, 2)], [seat(1, [3, 4])], [0]))
    assert made.pace.idle == 3
    assert made.pace.busy == 28
    assert made.pace.idle_share == pytest.approx(3 / 31)


def test_what_the_device_may_choose() -> None:
    made = runner(slots=9)
    wishes: list[dict[str, Any]] = [
        {}, {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, {"min_tokens": 1},
        {"logprobs": 0}, {"grammar": "x"}, {"presence_penalty": 0.1}, {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": (1,)}, {"bad_word_ids": ((1,),)},
    ]  # fmt: skip
    made._seat(plan([], [seat(slot, [1], SamplingParams(**wish)) for slot, wish in enumerate(wishes)]))
    assert [alone(made.slots.taken[slot]) for slot in range(9)] == [True, True, *[False] * 7]
    made.slots.append(2, 5)
    assert alone(made.slots.taken[2])


def test_parameters_of_rows() -> None:
    made = runner()
    warm = SamplingParams(temperature=0.5, top_k=5, top_p=0.25, min_p=0.1, seed=-3)
    cold = SamplingParams(temperature=1e-9, top_k=-1)
    made._seat(plan([], [seat(3, [1, 2], warm), seat(1, [1, 2], cold)]))
    assert made.tokens is not None
    whole, real = made.tokens.wishes([1, 3])
    assert whole.tolist() == [[1, 3], [0, 5]]
    assert real[:3].tolist() == [[0.0, 0.5], [1.0, 0.25], [0.0, 0.1]]
    assert real[3, 0] == 0.0
    assert 0 < real[3, 1] < 1
    filled = made.tokens.fill(torch.tensor([4, -4, 9, -2]))
    made.tokens.newest[3], made.tokens.newest[1] = 55, -1
    assert filled.tolist() == [4, 0, 9, 0]
    assert made.tokens.fill(torch.tensor([4, -4, 9, -2])).tolist() == [4, 55, 9, 0]
    assert np.array_equal(made.tokens.wishes([3])[1][:, 0], real[:, 1])


@needs_native
def test_native_kernels_choose_as_plain_torch_does() -> None:
    torch.manual_seed(3)
    sampler = Sampler(SimpleNamespace(name="native"))  # type: ignore[arg-type]
    logits = torch.randn((40, 200)) * 3
    logits[7, 3] = torch.nan
    logits[8] = -torch.inf
    real = [torch.rand(40, dtype=torch.float64) for _ in range(4)]
    temperature, top_p, min_p, noise = real[0] * 2, real[1], real[2] * 0.3, real[3]
    temperature[::5] = 0.0
    top_k = torch.arange(40) % 7
    parameters = (temperature, top_k, top_p, min_p, noise)
    expected_tokens = sample(logits.clone(), *parameters)
    assert expected_tokens[7:9].tolist() == [-1, -1]
    assert torch.equal(sampler.alone(logits.clone(), *parameters), expected_tokens)


def test_depth_and_recording_follow_device_and_settings() -> None:
    class Beside(CpuLane):
        overlaps = True

    def config(**options: Any) -> EngineConfig:
        return EngineConfig(max_num_seqs=4, **options)

    assert choose_depth(config(), CpuLane()) == (1, [])
    assert choose_depth(config(pipeline_depth="2"), CpuLane())[0] == 2
    assert choose_depth(config(), Beside())[0] == 2
    depth, notes = choose_depth(config(pipeline_depth="1"), Beside())
    assert (depth, notes) == (1, ["Steps under way: 1 (as told), none is planned ahead."])
    built: Any = SimpleNamespace(backend=SimpleNamespace(name="reference", capturable=False), model=Toy())
    assert record_steps(runner(), built, config(), 2, torch.float32) == (None, [])
    made = runner(lane=Beside())
    assert record_steps(made, built, config(), 2, torch.float32)[1] == [
        "CUDA graphs: none (attention by reference waits for the device in each step)."
    ]
    built.backend.capturable = True
    assert "Toy" in obstacle(built, config())
    built.model.capturable = True
    assert obstacle(built, config(enforce_eager=True)) == "as told by --enforce-eager"
    background, notes = record_steps(made, built, config(), 2, torch.float32)
    assert isinstance(background, Background)
    assert notes == ["CUDA graphs: decoding steps of up to 4 rows, in 3 sizes, when idle."]
    background.close()
