"""Choose one token for each row of logits, at the price of what the row asks for, without sorting the vocabulary.

Truncation is min_p, then top_k, then top_p. Among equal logits the lowest ids are kept. The draw is an inverse CDF in
the order of token ids: the first kept token at which the running sum of the probabilities exceeds the row's noise. A
row's token depends on its own logits, parameters, seed and token index alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import SamplingParams
from ropeway.errors import EngineError, NumericalError, RopewayError
from ropeway.runtime.draw import GREEDY_BELOW, NOT_FINITE, NOTHING_LEFT, draw
from ropeway.runtime.kernels.library import NativeLibrary, load
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.logits import History, wants_adjusting
from ropeway.runtime.noise import uniforms
from ropeway.runtime.slots import Slot

_ERRORS = {
    NOT_FINITE: "The model produced NaN or infinite logits. The request was ended; its neighbours are not affected.",
    NOTHING_LEFT: "No token is left after bias, min_tokens and penalties.",
}
_RECORD = struct.Struct("=6d q 3q 2q 2q 3q")
"""One `SampleRow` of cpu/sample.cpp."""
_NO_LISTS = (0,) * 10
_BEST = _RECORD.pack(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, *_NO_LISTS)


@dataclass(frozen=True)
class Want:
    """One row to sample: its seat and all its known tokens."""

    seat: Slot
    tokens: NDArray[np.int32]


Choose = Callable[[Tensor, Sequence[Slot | None], NDArray[np.float64]], list[int]]
"""From logits (n, vocab) float32, which may be changed, the seat of each row (None: anything will do) and its noise, to
a token for each row, or NOT_FINITE or NOTHING_LEFT."""


class Sampler:
    """Native where the other operations are, plain torch elsewhere. `library` names other kernels than this
    processor's best."""

    def __init__(self, ops: Ops, library: NativeLibrary | None = None) -> None:
        found = library or (load() if ops.name == "native" else None)
        self._choose: Choose = NativeChoice(found) if isinstance(found, NativeLibrary) else draw

    def sample(self, logits: Tensor, wants: Sequence[Want]) -> list[int | RopewayError]:
        """A token, or the error of that row alone, for each row of `logits` (E, vocab) float32, which may be changed.

        A row with NaN, +inf or no finite logit is a NumericalError.
        """
        seats: list[Slot | None] = []
        faults: dict[int, RopewayError] = {}
        for row, want in enumerate(wants):
            try:
                _prepare(want, logits.shape[1])
                seats.append(want.seat)
            except Exception as error:
                faults[row] = _as_error(error)
                seats.append(None)
        tokens: list[int | RopewayError] = []
        for row, token in enumerate(self._choose(logits, seats, _noise(seats))):
            tokens.append(faults.get(row) or (token if token >= 0 else NumericalError(_ERRORS[token])))
        return tokens


class NativeChoice:
    """A `Choose` in one call of the native kernels, its rows divided among the threads."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._scratch = torch.empty(0)

    def __call__(self, logits: Tensor, seats: Sequence[Slot | None], noise: NDArray[np.float64]) -> list[int]:
        if logits.dtype != torch.float32 or logits.device.type != "cpu" or not logits.is_contiguous():
            return draw(logits.float(), seats, noise)
        rows, vocab = logits.shape
        library = self._library
        needed = library.threads * library.sample_scratch(vocab)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        tokens = np.empty(rows, dtype=np.int64)
        library.sample(
            logits.data_ptr(),
            rows,
            vocab,
            b"".join([_BEST if seat is None else _record(seat) for seat in seats]),
            noise.ctypes.data,
            tokens.ctypes.data,
            self._scratch.data_ptr(),
            library.threads,
        )
        found: list[int] = tokens.tolist()
        return found


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < GREEDY_BELOW


def _prepare(want: Want, vocab: int) -> None:
    """Check what could fail, and note what the seat's wishes need to know of its tokens."""
    seat = want.seat
    if not isinstance(seat.seed, int):
        raise EngineError(f"The seed of request {seat.rid} is no integer.")
    if seat.history is None and wants_adjusting(seat.sampling, seat.generated):
        seat.history = History(seat.sampling, seat.eos_ids, vocab, want.tokens, seat.prompt_len)


def _noise(seats: Sequence[Slot | None]) -> NDArray[np.float64]:
    """A uniform number for each row that samples, 0 for the others."""
    noise = np.zeros(len(seats))
    drawn = [(row, seat) for row, seat in enumerate(seats) if seat is not None and not is_greedy(seat.sampling)]
    if drawn:
        noise[[row for row, _ in drawn]] = uniforms([s.seed for _, s in drawn], [s.generated for _, s in drawn])
    return noise


def _record(seat: Slot) -> bytes:
    wish = seat.sampling
    generated = seat.generated
    adjusts = seat.history is not None and wants_adjusting(wish, generated)
    if not adjusts and is_greedy(wish):
        return _BEST
    return _RECORD.pack(
        0.0 if is_greedy(wish) else wish.temperature,
        wish.top_p,
        wish.min_p,
        wish.repetition_penalty,
        wish.presence_penalty,
        wish.frequency_penalty,
        max(0, wish.top_k),
        *(seat.history.lists(wish, generated) if seat.history is not None and adjusts else _NO_LISTS),
    )


def _as_error(error: Exception) -> RopewayError:
    if isinstance(error, RopewayError):
        return error
    return EngineError(f"Sampling failed with {type(error).__name__}: {error}.")
