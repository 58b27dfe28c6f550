"""Recorded steps: what they compute, and that the rows which pad them leave no trace."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toykit import GREEDY, LONGEST, VOCAB, Toy, expected, plan, row, runner, seat

from ropeway.contract import SamplingParams
from ropeway.runtime import graphs
from ropeway.runtime.graphs import PATIENCE, Background, Columns, Graphs, sizes
from ropeway.runtime.runner import Runner


@given(st.integers(1, 4096))
def test_sizes(most: int) -> None:
    found = sizes(most)
    assert found[0] == most
    assert sorted(set(found), reverse=True) == list(found)
    assert found[-1] == 1
    for rows in {1, 2, 3, 9, most // 2 + 1, most}:
        if rows <= most:
            padded = min(size for size in found if size >= rows)
            assert padded - rows <= max(7, padded // 5)


def test_columns_are_views_of_one_array() -> None:
    """Written as an array and read as a tensor, in a narrower copy too."""
    data = np.zeros((Columns.ROWS, 3), np.int64)
    written = Columns(data)
    names = ["token_ids", "positions", "slots", "top_k", "temperature", "top_p", "min_p", "noise", "starts", "lengths",
             "write_slots"]  # fmt: skip
    for place, name in enumerate(names):
        getattr(written, name)[:] = [place, place + 0.5, -place]
    wide = torch.full((Columns.ROWS, 8), -1, dtype=torch.int64)
    wide[:, :3].copy_(torch.from_numpy(data))
    read = Columns(wide[:, :3])
    for place, name in enumerate(names):
        values = getattr(read, name)
        whole = values.dtype in (torch.int32, torch.int64)
        assert values.is_contiguous()
        assert values.tolist() == [place, place if whole else place + 0.5, -place]
    assert {getattr(read, name).dtype for name in names[4:8]} == {torch.float64}
    assert {getattr(read, name).dtype for name in names[8:]} == {torch.int32}


def board(made: Runner, number: int, sampling: SamplingParams = GREEDY) -> list[list[int]]:
    """`number` sequences whose prompts have been computed; their tokens."""
    prompts = [[3 + slot, 5 * slot + 1, 7] for slot in range(number)]
    admit = [seat(slot, tokens, sampling) for slot, tokens in enumerate(prompts)]
    result = made.step(plan([row(slot, 0, 3) for slot in range(number)], admit))
    return [tokens + found for tokens, found in zip(prompts, result.tokens, strict=True)]


@pytest.mark.parametrize("number", [1, 3, 6])
def test_recorded_steps_compute_what_others_do(number: int) -> None:
    made = runner(recorded=True)
    while made.capture():
        pass
    assert made.graphs is not None
    loads = count(made.graphs)
    known = board(made, number)
    for at in range(3, 12):
        order = [slot for slot in range(number) if (slot + at) % 4 or number == 1]
        result = made.step(plan([row(slot, len(known[slot]) - 1) for slot in order]))
        for slot, found in zip(order, result.tokens, strict=True):
            known[slot] += found
    assert len(loads) == 9
    for slot in range(number):
        assert known[slot] == known[slot][:3] + expected(known[slot][:3], len(known[slot]) - 3)


def count(recorded: Graphs) -> list[int]:
    """Numbers of rows of the recorded steps that are launched from now on."""
    found: list[int] = []
    fetch = recorded.fetch

    def counted(rows: int) -> object:
        found.append(rows)
        return fetch(rows)

    recorded.fetch = counted  # type: ignore[method-assign,assignment]
    return found


def test_padding_and_recording_leave_no_trace() -> None:
    """Neither in anybody's blocks nor among the newest tokens, though the inputs of the last step are still there."""
    made = runner(recorded=True)
    assert made.graphs is not None
    made.graphs.capture(6)
    known = board(made, 5)
    kv, tokens = made.kv.data, made.tokens
    assert tokens is not None
    before, newest = kv.clone(), tokens.newest.clone()
    with torch.inference_mode():
        made.graphs.load([row(slot, 3) for slot in range(5)])
        made.graphs.capture(4)
        made.graphs.capture(1)
    assert torch.equal(kv[: made.kv.scratch], before[: made.kv.scratch])
    assert torch.equal(tokens.newest[:-1], newest[:-1])
    result = made.step(plan([row(slot, 3) for slot in range(5)]))
    changed = (kv != before).any(dim=2)[: made.kv.scratch, 0].nonzero().flatten().tolist()
    assert changed == [8 * slot for slot in range(5) if known[slot][3]]
    assert result.tokens == [[expected(tokens[:3], 2)[1]] for tokens in known]


def test_rows_of_the_host_ride_along() -> None:
    """Their logits come from the states that the recorded step has left."""
    made = runner(recorded=True)
    while made.capture():
        pass
    assert made.graphs is not None
    loads = count(made.graphs)
    banned = SamplingParams(temperature=0.0, bad_word_ids=tuple((token,) for token in range(50)), logprobs=1)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    admit = [seat(slot, tokens, banned if slot == 1 else GREEDY) for slot, tokens in enumerate(prompts)]
    known = [list(tokens) for tokens in prompts]
    extras = 0
    result = made.step(plan([row(slot, 0, 3) for slot in range(3)], admit))
    for _ in range(5):
        for tokens, found in zip(known, result.tokens, strict=True):
            tokens += found
        result = made.step(plan([row(slot, len(known[slot]) - 1) for slot in range(3)]))
        extras += len(result.extras)
    assert loads == [3] * 5
    assert extras == 5
    assert known[0][3:] == expected(prompts[0], 5)
    assert known[2][3:] == expected(prompts[2], 5)
    for at in range(3, 8):
        best = expected(known[1][:at], 1)[0]
        assert known[1][at] == (best if best >= 50 else 50)


def test_other_steps_are_launched_kernel_by_kernel() -> None:
    made = runner(recorded=True)
    recorded = made.graphs
    assert recorded is not None
    while made.capture():
        pass
    board(made, 2, SamplingParams(temperature=0.0, prompt_logprobs=0))
    assert recorded.load([row(0, 3), row(1, 3)]) is not None
    assert recorded.load([row(0, 3), row(1, 2, 2)]) is None
    assert recorded.load([row(0, 3, emit=False)]) is None
    assert recorded.load([row(0, 1)]) is None  # its prompt's next token is to be told
    assert recorded.load([row(0, 3)] * 7) is None


def test_a_size_is_recorded_when_it_was_wanted_often() -> None:
    made = runner(recorded=True)
    assert made.graphs is not None
    board(made, 2)
    rows = [row(0, 3), row(1, 3)]
    for _ in range(PATIENCE - 1):
        assert made.graphs.load(rows) is None
    assert made.graphs.load(rows) is not None
    assert 2 not in made.graphs.missing
    assert made.graphs.missing == [6, 4, 1]


class Stubborn(Toy):
    """Cannot compute fewer than three rows while `refuses`."""

    refuses = True

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        if self.refuses and len(states) < 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().logits(states)


def test_what_cannot_be_recorded_is_launched_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    model = Stubborn()
    made = runner(model, recorded=True)
    while made.capture():
        pass
    assert "Steps of 2 rows could not be recorded (RuntimeError: operation not permitted" in caplog.text
    assert "Those of 4, 6 are replayed" in caplog.text
    model.refuses = False
    known = board(made, 2)
    result = made.step(plan([row(slot, 3) for slot in range(2)]))
    assert result.tokens == [[expected(tokens[:3], 2)[1]] for tokens in known]


def test_recording_waits_for_a_pause() -> None:
    made = runner(recorded=True)
    assert made.graphs is not None
    every = list(made.graphs.missing)
    ticket = made.begin(plan([row(0, 0, 2)], [seat(0, [1, 2])]))
    assert made.capture()
    assert made.graphs.missing == every
    made.finish(ticket)
    assert made.capture(quiet=3600.0)
    assert made.graphs.missing == every
    assert made.capture()
    assert made.graphs.missing == every[1:]


def test_the_background_ends_when_all_is_recorded_or_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "QUIET", 0.001)
    made = runner(recorded=True)
    assert made.graphs is not None
    background = Background(made.capture)
    background._thread.join(60)
    assert not background._thread.is_alive()
    assert made.graphs.missing == []
    begun = threading.Event()

    def never(quiet: float) -> bool:
        begun.set()
        return True

    endless = Background(never)
    assert begun.wait(60)
    endless.close()
    assert not endless._thread.is_alive()
    background.close()


def test_the_longest_context_fits() -> None:
    """The last token of a full sequence is computed in a recorded step too."""
    made = runner(recorded=True, slots=1, blocks=8)
    while made.capture():
        pass
    known = [(7 * place) % VOCAB for place in range(LONGEST - 1)]
    result = made.step(plan([row(0, 0, len(known))], [seat(0, known)]))
    known += result.tokens[0]
    result = made.step(plan([row(0, LONGEST - 1)]))
    assert result.tokens == [[expected(known, 1)[0]]]
