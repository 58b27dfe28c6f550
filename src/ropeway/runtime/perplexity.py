"""How well a model predicts a text, computed by the same runner that serves."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ropeway.contract import Admit, Row, SamplingParams
from ropeway.errors import NumericalError
from ropeway.runtime.gather import gather
from ropeway.runtime.runner import Runner

Done = Callable[[], None]


@dataclass(frozen=True)
class Score:
    """`nats` of `predicted` tokens; `computed` counts the tokens of all windows, and took `seconds`."""

    nats: float
    predicted: int
    computed: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.predicted)


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first): score the tokens [first, end) of a text of `length` tokens, having read from `begin`.

    Windows of `context` tokens overlap by half, so that every token but those of the first window is predicted from at
    least `context` / 2 tokens before it. The first token of all has nothing to be predicted from.
    """
    first = 1
    for begin in range(0, length, max(context // 2, 1)):
        end = min(begin + context, length)
        if first < end:
            yield begin, end, first
        first = end
        if end == length:
            return


@torch.inference_mode()
def score(
    runner: Runner,
    tokens: Sequence[int],
    *,
    context: int,
    chunk: int,
    start: Sequence[int] = (),
    done: Done = lambda: None,
) -> Score:
    """Score `tokens` with windows of `context` tokens, `chunk` to a step; each begins with the tokens `start`.

    Takes slot 0 and the first blocks of the KV cache, so nothing else may run. `done` is called after each window.
    Raises NumericalError if the model computes NaN.
    """
    begun = time.perf_counter()
    nats, predicted, computed = 0.0, 0, 0
    for begin, end, first in windows(len(tokens), context - len(start)):
        window = [*start, *tokens[begin:end]]
        nats += _window(runner, window, len(start) + first - begin, chunk)
        predicted += end - first
        computed += len(window)
        done()
    if math.isnan(nats):
        raise NumericalError("The model computes NaN for this text: its weights are damaged, or --dtype is too narrow.")
    return Score(nats, predicted, computed, time.perf_counter() - begun)


def _window(runner: Runner, window: list[int], first: int, chunk: int) -> float:
    """Nats of the tokens [first, ...) of one sequence."""
    slots, size = runner.slots, len(window)
    blocks = list(range(-(-size // slots.block_size)))
    slots.admit(Admit(0, 0, 0, window, size, 0, blocks, SamplingParams(), ()), 0)
    nats = 0.0
    try:
        for start in range(0, size, chunk):
            count = min(chunk, size - start)
            row = Row(0, 0, 0, start, count, False, [])
            slots.extend(row)
            # The logits at position p are about token p + 1.
            wanted = range(max(first - 1, start), min(start + count, size - 1))
            inputs = gather([row], slots, runner.lane)
            rows = torch.arange(wanted.start - start, max(wanted.stop, wanted.start) - start, device=runner.lane.device)
            logits = runner.model.forward(dataclasses.replace(inputs, logits_rows=rows), runner.kv.data)
            targets = torch.tensor(
                window[wanted.start + 1 : wanted.stop + 1], dtype=torch.int64, device=runner.lane.device
            )
            nats += float(functional.cross_entropy(logits, targets, reduction="sum")) if len(targets) else 0.0
    finally:
        slots.release(0)
    return nats
