"""With two steps under way, and with recorded steps, every answer is the one that it is with one step at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ways import LENGTHS, NUMBER, Run, expected

from checkpoints import prompt
from pipelines import WAYS, Parity, executor
from ropeway.contract import FinishReason, GenerateRequest, SamplingParams, Submit, TokenEvent
from ropeway.contract.message import Cancel

Make = Callable[[str], Path]
STARVED = {"num_kv_blocks": 12, "max_num_batched_tokens": 40}
SWAPPED = {**STARVED, "kv_host_gib": 0.01, "preemption_mode": "swap"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "mixed": {},
    "chunks-of-7": {"max_num_batched_tokens": 7, "kernel_level": "0"},
    "starved": STARVED,
    "starved-and-swapped": SWAPPED,
    "static": {"batching": "static", "max_num_seqs": 4},
}
CANCELLED = (3, 10)


class Rated(Run):
    """A run in one of the `WAYS`, and the tokens whose probability was told."""

    def __init__(self, directory: Path, way: str, **options: Any) -> None:
        super().__init__(directory, execute=partial(executor, way=way), **options)
        self.rated: dict[int, list[int]] = {}

    def ask(self, rid: int, tokens: list[int], **wishes: Any) -> None:
        self.rated[rid] = []
        super().ask(rid, tokens, **wishes)

    def take(self, event: TokenEvent) -> None:
        super().take(event)
        if event.extra is not None:
            self.rated[event.rid] += [one.token for one in event.extra.logprobs]

    def cancel(self, rid: int) -> None:
        self.engine.submit([Cancel(rid)])

    def blocks(self, rid: int) -> list[int]:
        return next(seq.blocks for seq in self.engine.scheduler.running if seq.rid == rid)


@pytest.mark.parametrize("way", ["two", "recorded"])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral-window"])
def test_equals_transformers(checkpoint: Make, kind: str, condition: str, way: str) -> None:
    directory = checkpoint(kind)
    run = Rated(directory, way, blind="starved" in condition, **CONDITIONS[condition])
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length))
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length))), f"prompt of {length}"
    counters = run.engine.scheduler.counters
    assert (counters.preemptions > 0) == ("starved" in condition)
    if "swapped" in condition:
        assert sum(shelf.hits for shelf in run.engine.scheduler.memory.lower) > 0
    assert run.engine.scheduler.pool.available == run.engine.scheduler.pool.num_blocks


def wishes_of(rid: int) -> dict[str, Any]:
    """All kinds of sampling, half of which the device can do by itself. Many tokens end an answer, so that steps are
    under way for sequences that have ended."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05, "min_tokens": 4},
        {"temperature": 1.0, "grammar": "parity"},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "logit_bias": {7: 4.0}, "bad_word_ids": ((9, 10), (11,))},
        {"temperature": 1.0, "allowed_token_ids": tuple(range(3, 300, 5)), "prompt_logprobs": 1},
    ]
    return {"seed": rid, "stop_token_ids": tuple(range(20, 50)), "max_tokens": 24, **kinds[rid % len(kinds)]}


def crowd(directory: Path, way: str, seed: int, **options: Any) -> Rated:
    """Requests of all kinds come, share beginnings, are cancelled, and end when they like."""
    dice = random.Random(seed)
    run = Rated(directory, way, blind=True, **options)
    common = prompt(seed, 30)
    for rid in range(18):
        run.ask(rid, common[: dice.choice([0, 16, 30])] + prompt(rid, dice.randint(1, 20)), **wishes_of(rid))
        run.steps(dice.randint(0, 3))
        if rid - 3 in CANCELLED:
            run.cancel(rid - 3)
    run.steps()
    return run


@pytest.mark.parametrize(("seed", "options"), [(1, {}), (2, STARVED), (3, SWAPPED), (4, {"max_num_seqs": 2})])
def test_all_kinds_of_requests_together(checkpoint: Make, seed: int, options: dict[str, Any]) -> None:
    directory = checkpoint("llama")
    runs = [crowd(directory, way, seed, **options) for way in WAYS]
    for rid in range(18):
        one, two, recorded = (run.tokens[rid] for run in runs)
        if rid in CANCELLED:  # perhaps a step earlier or later
            length = min(map(len, (one, two, recorded)))
            assert one[:length] == two[:length] == recorded[:length]
            continue
        assert one == two == recorded, (rid, wishes_of(rid))
        for run in runs:
            assert run.rated[rid] == (run.tokens[rid] if "logprobs" in wishes_of(rid) else [])
        assert {run.final[rid].finish for run in runs} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert len({len(tokens) for tokens in runs[0].tokens.values()}) > 3
    for run in runs:
        assert run.engine.scheduler.pool.available == run.engine.scheduler.pool.num_blocks


def test_a_grammar_is_followed_beside_rows_that_run_ahead(checkpoint: Make) -> None:
    run = Rated(checkpoint("llama"), "two")
    for rid in range(4):
        run.ask(rid, prompt(rid, 9), seed=rid, temperature=1.0, **({"grammar": "parity"} if rid % 2 else {}))
    run.steps()
    for rid in range(4):
        tokens = prompt(rid, 9) + run.tokens[rid]
        assert Parity.follows(tokens, 9) or rid % 2 == 0
    assert not all(Parity.follows(prompt(rid, 9) + run.tokens[rid], 9) for rid in range(4))


@pytest.mark.parametrize("way", ["two", "recorded"])
def test_nan_in_one_sequence_leaves_the_others_untouched(checkpoint: Make, way: str) -> None:
    """A step for it is under way when the fault is heard of. Others then take its blocks."""
    directory = checkpoint("llama")
    run = Rated(directory, way, num_kv_blocks=40)
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length))
    run.steps(4)
    poisoned = run.blocks(1)
    run.engine.executor.runner.kv.data[poisoned] = torch.nan
    run.steps()
    for rid, length in enumerate(LENGTHS):
        run.ask(10 + rid, prompt(90 + length, length))
    run.steps()
    assert run.final[1].finish is FinishReason.FAILED
    assert run.final[1].error is not None
    assert run.final[1].error.code == "RW-NAN"
    clean = Rated(directory, "one")
    for rid in run.tokens:
        clean.ask(rid, prompt(LENGTHS[rid % 10] + 90 * (rid >= 10), LENGTHS[rid % 10]))
    clean.steps()
    for rid in run.tokens.keys() - {1}:
        assert run.tokens[rid] == clean.tokens[rid]
    assert run.tokens[1] == clean.tokens[1][: len(run.tokens[1])]


class Bomb:
    """A model that cannot compute a batch with a certain token in it."""

    def __init__(self, model: Any, token: int) -> None:
        self.model, self.token, self.calls = model, token, 0

    def forward(self, inputs: Any, kv: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.forward(inputs, kv)
        if (inputs.token_ids == self.token).any():
            self.calls += 1
            raise RuntimeError("bomb")
        return logits


def test_a_step_that_raises_fails_one_row_of_it_and_no_later_one(checkpoint: Make) -> None:
    """The row that is to blame is found by halving, while its token is known to nobody but the device; a row for it is
    in the next step already."""
    directory = checkpoint("qwen3")
    clean = Rated(directory, "one")
    for rid, length in enumerate(LENGTHS):
        clean.ask(rid, prompt(length, length))
    clean.steps()
    rid, at = next(
        (rid, at)
        for rid, output in clean.tokens.items()
        for at, token in enumerate(output[2:-4], 2)
        if sum(token in prompt(n, n) for n in LENGTHS) + sum(out.count(token) for out in clean.tokens.values()) == 1
    )
    run = Rated(directory, "two")
    bomb = run.engine.executor.runner.model = Bomb(run.engine.executor.runner.model, clean.tokens[rid][at])
    for number, length in enumerate(LENGTHS):
        run.ask(number, prompt(length, length))
    run.steps()
    assert run.final[rid].finish is FinishReason.FAILED
    assert run.final[rid].error is not None
    assert "RuntimeError: bomb" in run.final[rid].error.message
    assert run.tokens[rid] == clean.tokens[rid][: at + 1]
    for other in clean.tokens.keys() - {rid}:
        assert run.tokens[other] == clean.tokens[other]
    assert bomb.calls <= 8


def test_vectors_are_the_same(checkpoint: Make) -> None:
    found: list[dict[int, bytes]] = []
    for way in ("one", "two"):
        run = Rated(checkpoint("llama"), way, max_num_batched_tokens=11)
        for rid, kind in enumerate(["last", "mean", "cls", ""]):
            sampling = SamplingParams(max_tokens=1 if kind else NUMBER, temperature=0.0)
            request = GenerateRequest(rid=rid, tokens=prompt(rid, 20), sampling=sampling, pooling=kind, cache=not kind)
            run.engine.submit([Submit(request)])
        found.append({})
        while run.engine.busy:
            for event in run.engine.step().events:
                if event.extra is not None:
                    found[-1][event.rid] = event.extra.vector
    assert found[0].keys() == {0, 1, 2}
    assert found[0] == found[1]
