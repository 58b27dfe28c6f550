"""Choose one token for each row of logits, at the price of what the row asks for, without sorting the vocabulary.

First the row's logits are adjusted (see `ropeway.runtime.logits`) and masked. Truncation is min_p, then top_k, then
top_p. Among equal logits the lowest ids are kept. The draw is an inverse CDF in the order of token ids: the first kept
token at which the running sum of the probabilities exceeds the row's noise. A row's token depends on its own logits,
mask, parameters, seed and token index alone.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import SamplingParams, TokenLogprob
from ropeway.errors import EngineError, NumericalError, RequestError, RopewayError
from ropeway.runtime.device_sampler import Sample, sample
from ropeway.runtime.draw import GREEDY_BELOW, NOT_FINITE, draw
from ropeway.runtime.kernels.library import NativeLibrary, load
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.logits import History, wants_adjusting
from ropeway.runtime.logprobs import Measure, NativeMeasure, measure, token_logprobs
from ropeway.runtime.noise import uniforms
from ropeway.runtime.slots import Slot

_NOT_FINITE = "The model produced NaN or infinite logits. The request was ended; its neighbours are not affected."
_NO_GUIDE = "This engine cannot follow a grammar."
_NOTHING_LEFT = (
    "No token may come next: grammar, allowed_token_ids, bad_words, min_tokens and logit_bias together ban all of "
    "them. Ask for less."
)
_RECORD = struct.Struct("=6d q 3q 2q 2q 3q q")
"""One `SampleRow` of cpu/sample.cpp."""
_NO_LISTS = (0,) * 10
_WORD = np.dtype(np.uint32)
_NO_MASKS = np.zeros((1, 1), _WORD)
_BEST = _RECORD.pack(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, *_NO_LISTS, 0)


@dataclass(frozen=True)
class Want:
    """One row to sample: its seat and all its known tokens."""

    seat: Slot
    tokens: NDArray[np.int32]


class Guide(Protocol):
    """Steers sequences whose requests bring a grammar, `seat.sampling.grammar`.

    Each such row of a step that yields a token is a want: `begin` gets all of them, `masks` those that were computed.
    `want.tokens` are prompt and output; what the guide remembers of a sequence goes into `seat.matcher`, which is None
    for one that has just boarded (perhaps again, with output). Neither may raise for the sake of one sequence.
    """

    def prepare(self, grammar: str) -> object:
        """A sequence with this grammar has boarded. Its prompt is computed first, so there is time to compile it."""

    def begin(self, wants: Sequence[Want]) -> None:
        """The step is about to be computed: masks may be made beside it, on another thread."""

    def masks(self, wants: Sequence[Want]) -> Sequence[NDArray[np.uint32] | RopewayError | None]:
        """For each, which tokens may come next (see `Slot.mask`), None for any, or why that row must fail."""


Choose = Callable[[Tensor, Sequence[Slot | None], NDArray[np.float64]], list[int]]
"""From logits (n, vocab) float32, which may be changed, the seat of each row (None: anything will do) and its noise, to
a token for each row, or NOT_FINITE or NOTHING_LEFT."""


class Sampler:
    """Native where the other operations are, plain torch elsewhere. `library` names other kernels than this
    processor's best. Without a `guide`, requests with a grammar fail."""

    def __init__(self, ops: Ops, library: NativeLibrary | None = None, guide: Guide | None = None) -> None:
        self._guide = guide
        found = library or (load() if ops.name == "native" else None)
        native = NativeChoice(found) if isinstance(found, NativeLibrary) else None
        self._choose: Choose = native or draw
        self.alone: Sample = native.alone if native is not None else sample
        """How rows that nobody steers get their tokens without the host's doing."""
        self._measure: Measure = NativeMeasure(found) if isinstance(found, NativeLibrary) else measure

    def board(self, sampling: SamplingParams) -> None:
        """A sequence that samples so has taken a seat."""
        if sampling.grammar and self._guide is not None:
            self._guide.prepare(sampling.grammar)

    def begin(self, wants: Sequence[Want]) -> None:
        """A step is about to be computed whose emitting rows are `wants`."""
        guided = _guided(wants)
        if guided and self._guide is not None:
            self._guide.begin([wants[row] for row in guided])

    def sample(self, logits: Tensor, wants: Sequence[Want]) -> list[int | RopewayError]:
        """A token, or the error of that row alone, for each row of `logits` (E, vocab) float32, which may be changed.

        A row with NaN, +inf or no finite logit is a NumericalError; one whose wishes leave no token a RequestError.
        """
        seats: list[Slot | None] = []
        faults: dict[int, RopewayError] = {}
        self._set_masks(wants, faults)
        for row, want in enumerate(wants):
            if row in faults:
                seats.append(None)
                continue
            try:
                _prepare(want, logits.shape[1])
                seats.append(want.seat)
            except Exception as error:
                faults[row] = _as_error(error)
                seats.append(None)
        tokens: list[int | RopewayError] = []
        for row, token in enumerate(self._choose(logits, seats, _noise(seats))):
            tokens.append(faults.get(row) or (token if token >= 0 else no_token(token)))
        return tokens

    def logprobs(
        self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprob | RopewayError]:
        """For each row of `logits` (n, vocab) float32, as the model gave them, its token's log probability, with those
        of as many of the likeliest tokens as `counts` says. A row that is NaN or infinite is a NumericalError."""
        found = token_logprobs(self._measure, logits, tokens, counts)
        return [NumericalError(_NOT_FINITE) if entry is None else entry for entry in found]

    def _set_masks(self, wants: Sequence[Want], faults: dict[int, RopewayError]) -> None:
        guided = _guided(wants)
        if not guided:
            return
        if self._guide is None:
            faults.update((row, RequestError(_NO_GUIDE, param="grammar")) for row in guided)
            return
        for row, mask in zip(guided, self._guide.masks([wants[row] for row in guided]), strict=True):
            seat = wants[row].seat
            if isinstance(mask, RopewayError):
                faults[row] = mask
            elif mask is None or seat.allowed is None:
                seat.mask = seat.allowed if mask is None else mask
            else:
                seat.mask = mask & seat.allowed


class NativeChoice:
    """A `Choose` in one call of the native kernels, its rows divided among the threads."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._scratch = torch.empty(0)

    def __call__(self, logits: Tensor, seats: Sequence[Slot | None], noise: NDArray[np.float64]) -> list[int]:
        if not _is_native(logits):
            return draw(logits.float(), seats, noise)
        # Side by side, so that numpy is asked for one address: that takes it as long as all else for a row.
        masks = [seat.mask for seat in seats if seat is not None and seat.mask is not None]
        words = np.stack(masks) if masks else _NO_MASKS
        places = itertools.count(words.ctypes.data if masks else 0, words.strides[0])
        records = b"".join([_BEST if seat is None else _record(seat, places) for seat in seats])
        found: list[int] = self._run(logits, records, noise).tolist()
        return found

    def alone(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, noise: Tensor
    ) -> Tensor:
        """See `ropeway.runtime.device_sampler.sample`; here `logits` may be changed."""
        if not _is_native(logits):
            return sample(logits.float(), temperature, top_k, top_p, min_p, noise)
        rows = zip(temperature.tolist(), top_p.tolist(), min_p.tolist(), top_k.tolist(), strict=True)
        records = b"".join([_RECORD.pack(t, p, m, 1.0, 0.0, 0.0, k, *_NO_LISTS, 0) for t, p, m, k in rows])
        return torch.from_numpy(self._run(logits, records, noise.numpy()))

    def _run(self, logits: Tensor, records: bytes, noise: NDArray[np.float64]) -> NDArray[np.int64]:
        rows, vocab = logits.shape
        library = self._library
        needed = library.threads * library.sample_scratch(vocab)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        tokens = np.empty(rows, dtype=np.int64)
        library.sample(
            logits.data_ptr(), rows, vocab, records, noise.ctypes.data, tokens.ctypes.data, self._scratch.data_ptr(),
            library.threads,
        )  # fmt: skip
        return tokens


def _is_native(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()


def _guided(wants: Sequence[Want]) -> list[int]:
    return [row for row, want in enumerate(wants) if want.seat.sampling.grammar]


def no_token(code: int) -> RopewayError:
    """What NOT_FINITE and NOTHING_LEFT mean."""
    return NumericalError(_NOT_FINITE) if code == NOT_FINITE else RequestError(_NOTHING_LEFT)


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < GREEDY_BELOW


def _prepare(want: Want, vocab: int) -> None:
    """Check what could fail, and note what the seat's wishes need to know of its tokens."""
    seat = want.seat
    if not isinstance(seat.seed, int):
        raise EngineError(f"The seed of request {seat.rid} is no integer.")
    if seat.history is None and wants_adjusting(seat.sampling, seat.generated):
        seat.history = History(seat.sampling, seat.eos_ids, vocab, want.tokens, seat.prompt_len)
    words, mask = -(-vocab // 32), seat.mask
    if mask is not None and not (mask.dtype == _WORD and mask.shape == (words,) and mask.flags.c_contiguous):
        raise EngineError(f"The mask of request {seat.rid} is {mask.dtype} {mask.shape}, not {words} words of uint32.")


def _noise(seats: Sequence[Slot | None]) -> NDArray[np.float64]:
    """A uniform number for each row that samples, 0 for the others."""
    noise = np.zeros(len(seats))
    drawn = [(row, seat) for row, seat in enumerate(seats) if seat is not None and not is_greedy(seat.sampling)]
    if drawn:
        noise[[row for row, _ in drawn]] = uniforms([s.seed for _, s in drawn], [s.generated for _, s in drawn])
    return noise


def _record(seat: Slot, masks: Iterator[int]) -> bytes:
    """`masks` has the address of the next mask."""
    wish = seat.sampling
    generated = seat.generated
    adjusts = seat.history is not None and wants_adjusting(wish, generated)
    if not adjusts and seat.mask is None and is_greedy(wish):
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
        0 if seat.mask is None else next(masks),
    )


def _as_error(error: Exception) -> RopewayError:
    if isinstance(error, RopewayError):
        return error
    return EngineError(f"Sampling failed with {type(error).__name__}: {error}.")
