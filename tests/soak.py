"""An engine under everything at once for as long as one likes: arrivals, cancels, preemption, tiers, all kinds of
sampling. Each answer is compared with what the same request was answered before, and greedy ones with transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from blind import Blind
from checkpoints import greedy, prompt
from invariants import check
from ropeway.config import EngineConfig
from ropeway.contract import Cancel, Command, FinishReason, GenerateRequest, SamplingParams, Submit, TokenEvent
from ropeway.engine import engine
from ropeway.engine.engine import Engine
from ropeway.runtime.local import LocalExecutor
from ropeway.scheduler import Scheduler

MOST = 24
"""Tokens of the longest answer."""
_SHARED = prompt(40, 40)
PROMPTS = [*(prompt(n, n) for n in (3, 9, 17, 33, 58)), *(_SHARED[:n] + prompt(n, 5) for n in (8, 16, 40))]
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.1, "top_k": 30, "min_p": 0.01, "seed": 3},
    {"temperature": 0.7, "repetition_penalty": 1.2, "seed": 4},
]
"""Some are sampled on the device, some need the host; every one of them gives the same text each time."""


@dataclass
class Asked:
    """A request under way or over: which prompt and wish, and what has come."""

    prompt: int
    wish: int
    most: int
    tokens: list[int] = field(default_factory=list)
    final: TokenEvent | None = None


class Soak:
    """`run` it until `over(steps)`, then `finish`."""

    def __init__(self, directory: Path, device: str = "auto", seed: int = 0, **changes: Any) -> None:
        values: dict[str, Any] = {
            "num_kv_blocks": 26, "block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 48, "threads": 1,
            "max_model_len": 96, "dtype": "float32", "kv_host_gib": 0.005, "preemption_mode": "swap",
        } | changes  # fmt: skip
        config = EngineConfig(model=str(directory), device=device, **values)
        with patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())):
            self.engine = Engine(LocalExecutor(config), config)
        self.directory, self.random = directory, random.Random(seed)
        self.asked: dict[int, Asked] = {}
        self.open: list[int] = []
        self.steps = self.cancels = 0
        self.texts: dict[tuple[int, int], list[int]] = {}

    def run(self, over: Callable[[int], bool]) -> None:
        while not over(self.steps):
            draw = self.random.random()
            if len(self.open) < 16 and draw < 0.4:
                self._ask()
            elif self.open and draw > 0.96:
                self.cancels += 1
                self._submit(Cancel(self.random.choice(self.open)))
            if self.engine.busy:
                self._step()
            self.steps += 1
            if self.steps % 50 == 0:
                check(self.engine.scheduler)

    def finish(self) -> None:
        """Let everybody end; then nothing may be held by anyone, and everybody has been told exactly once."""
        while self.engine.busy:
            self._step()
        scheduler = self.engine.scheduler
        check(scheduler)
        assert scheduler.pool.available == scheduler.pool.num_blocks
        assert all(asked.final is not None for asked in self.asked.values())
        for (number, wish), text in self.texts.items():
            if WISHES[wish]["temperature"] == 0.0:
                assert text == greedy(self.directory, PROMPTS[number], MOST)[: len(text)], f"prompt {number}"

    def _ask(self) -> None:
        rid = len(self.asked)
        asked = Asked(
            self.random.randrange(len(PROMPTS)), self.random.randrange(len(WISHES)), self.random.randint(1, MOST)
        )
        sampling = SamplingParams(max_tokens=asked.most, **WISHES[asked.wish])
        request = GenerateRequest(rid=rid, tokens=PROMPTS[asked.prompt], sampling=sampling)
        self.asked[rid] = asked
        self.open.append(rid)
        self._submit(Submit(request))

    def _submit(self, command: Command) -> None:
        for report in self.engine.submit([command]):
            self._take(report.events)  # type: ignore[union-attr]

    def _step(self) -> None:
        self._take(self.engine.step().events)

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            asked = self.asked[event.rid]
            assert asked.final is None, f"request {event.rid} goes on after its end"
            asked.tokens += event.tokens
            if event.finish is None:
                continue
            asked.final = event
            self.open.remove(event.rid)
            assert event.finish in (FinishReason.LENGTH, FinishReason.CANCELLED), event
            if event.finish is FinishReason.LENGTH:
                assert len(asked.tokens) == asked.most
            self._compare(asked)

    def _compare(self, asked: Asked) -> None:
        """The shorter of two answers to the same question is the longer one's beginning."""
        known = self.texts.setdefault((asked.prompt, asked.wish), [])
        common = min(len(known), len(asked.tokens))
        assert asked.tokens[:common] == known[:common], f"prompt {asked.prompt} under {WISHES[asked.wish]}"
        if len(asked.tokens) > len(known):
            self.texts[asked.prompt, asked.wish] = asked.tokens
