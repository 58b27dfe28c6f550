"""Choose one token for each row of logits, at the price of what the row asks for.

Greedy rows are an argmax. Plain temperature is an inverse CDF over block sums. top_k, top_p and min_p work on a few
dozen candidates in the fixed order (logit descending, id ascending); more are taken only if the kept mass needs them,
so the vocabulary is never sorted without need. A row's token depends on its own logits, parameters, seed and token
index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import SamplingParams
from ropeway.errors import EngineError, NumericalError, RopewayError
from ropeway.runtime.kernels.ops import Ops
from ropeway.runtime.logits import History, adjust, has_penalties, wants_adjusting
from ropeway.runtime.noise import uniforms
from ropeway.runtime.slots import Slot

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""
_CANDIDATES = (64, 512)
_BLOCK = 256


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Want:
    """One row to sample: its seat and all its known tokens."""

    seat: Slot
    tokens: NDArray[np.int32]


Draw = Callable[[Tensor, Sequence[SamplingParams], NDArray[np.float64]], list[int]]
"""From logits (n, vocab), the parameters of each row and its uniform number to a token for each row."""


class Sampler:
    """Stateless but for the operations it uses."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def sample(self, logits: Tensor, wants: Sequence[Want]) -> list[int | RopewayError]:
        """A token, or the error of that row alone, for each row of `logits` (E, vocab) float32, which may be changed.

        A row with NaN, +inf or no finite logit is a NumericalError.
        """
        best, finite = self.ops.argmax(logits)
        chosen: list[int | RopewayError] = list(best.tolist())
        fine = finite.tolist()
        adjusted: list[int] = []
        for i, want in enumerate(wants):
            if not fine[i]:
                chosen[i] = NumericalError(
                    "The model produced NaN or infinite logits. The request was ended; its neighbours are not affected."
                )
            elif wants_adjusting(want.seat.sampling, want.seat.generated):
                try:
                    _adjust(logits[i], want)
                    adjusted.append(i)
                except Exception as error:
                    chosen[i] = _as_error(error)
        if adjusted:
            best, finite = self.ops.argmax(logits[adjusted])
            for i, token, ok in zip(adjusted, best.tolist(), finite.tolist(), strict=True):
                chosen[i] = token if ok else NumericalError("No token is left after bias, min_tokens and penalties.")
        self._draw(logits, wants, chosen)
        return chosen

    def _draw(self, logits: Tensor, wants: Sequence[Want], chosen: list[int | RopewayError]) -> None:
        """Replace the greedy choice of the rows that sample."""
        vocab = logits.shape[1]
        plain: list[int] = []
        truncated: list[int] = []
        for i, want in enumerate(wants):
            if isinstance(chosen[i], int) and not is_greedy(want.seat.sampling):
                (truncated if _truncates(want.seat.sampling, vocab) else plain).append(i)
        for rows, draw in ((plain, _draw_plain), (truncated, _draw_truncated)):
            if not rows:
                continue
            try:
                found: Sequence[int | RopewayError] = self._draw_rows(draw, logits, rows, wants)
            except Exception:
                found = [self._draw_alone(draw, logits, i, wants) for i in rows]
            for i, token in zip(rows, found, strict=True):
                chosen[i] = token

    def _draw_rows(self, draw: Draw, logits: Tensor, rows: list[int], wants: Sequence[Want]) -> list[int]:
        seats = [wants[i].seat for i in rows]
        noise = uniforms([s.seed for s in seats], [s.generated for s in seats])
        part = logits if len(rows) == len(wants) else logits[rows]
        return draw(part, [s.sampling for s in seats], noise)

    def _draw_alone(self, draw: Draw, logits: Tensor, row: int, wants: Sequence[Want]) -> int | RopewayError:
        """Of rows that failed together, each by itself, so that only the one to blame fails."""
        try:
            return self._draw_rows(draw, logits, [row], wants)[0]
        except Exception as error:
            return _as_error(error)


def _adjust(row: Tensor, want: Want) -> None:
    seat = want.seat
    if seat.history is None and has_penalties(seat.sampling):
        seat.history = History(want.tokens, seat.prompt_len)
    adjust(row, seat.sampling, seat.generated, seat.eos_ids, seat.history)


def _as_error(error: Exception) -> RopewayError:
    if isinstance(error, RopewayError):
        return error
    return EngineError(f"Sampling failed with {type(error).__name__}: {error}.")


def _truncates(sampling: SamplingParams, vocab: int) -> bool:
    return 0 < sampling.top_k < vocab or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _weights(logits: Tensor, sampling: Sequence[SamplingParams], out: Tensor | None = None) -> Tensor:
    """exp((logit - max) / temperature), (n, vocab) float32, in `out` if given."""
    shifted = torch.sub(logits, logits.amax(dim=1, keepdim=True), out=out)
    return shifted.div_(_column([s.temperature for s in sampling], logits)).exp_()


def _draw_plain(logits: Tensor, sampling: Sequence[SamplingParams], noise: NDArray[np.float64]) -> list[int]:
    """Inverse CDF in the order of token ids: find the block in which the noise falls, then the token in the block."""
    number, vocab = logits.shape
    blocks = -(-vocab // _BLOCK)
    weights = logits.new_empty((number, blocks * _BLOCK))
    weights[:, vocab:] = 0
    _weights(logits, sampling, weights[:, :vocab])
    split = weights.view(number, blocks, _BLOCK)
    upto = split.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = torch.from_numpy(noise).to(logits.device) * upto[:, -1]
    block = (upto <= target[:, None]).sum(dim=1).clamp_(max=blocks - 1)
    rows = torch.arange(number, device=logits.device)
    before = torch.where(block > 0, upto[rows, (block - 1).clamp(min=0)], 0.0)
    inside = split[rows, block].double()
    place = (before[:, None] + inside.cumsum(dim=1) <= target[:, None]).sum(dim=1)
    # The block's sum and the running sum inside it may round apart: never go beyond the last token with any weight.
    last = (_BLOCK - 1) - (inside > 0).flip(1).int().argmax(dim=1)
    tokens: list[int] = (block * _BLOCK + torch.minimum(place, last)).tolist()
    return tokens


def _draw_truncated(logits: Tensor, sampling: Sequence[SamplingParams], noise: NDArray[np.float64]) -> list[int]:
    """min_p, then top_k, then top_p, then inverse CDF among the kept candidates."""
    number, vocab = logits.shape
    chosen = np.full(number, -1, dtype=np.int64)
    mass = _nucleus_mass(logits, sampling)
    open_rows = list(range(number))
    for count in (*(c for c in _CANDIDATES if c < vocab), vocab):
        part = logits if len(open_rows) == number else logits[open_rows]
        params = [sampling[i] for i in open_rows]
        tokens = _choose(part, params, noise[open_rows], mass[open_rows], count)
        chosen[open_rows] = tokens
        open_rows = [i for i, token in zip(open_rows, tokens.tolist(), strict=True) if token < 0]
        if not open_rows:
            break
    result: list[int] = chosen.tolist()
    return result


def _nucleus_mass(logits: Tensor, sampling: Sequence[SamplingParams]) -> NDArray[np.float64]:
    """The weight of the whole vocabulary for rows with top_p alone; NaN for others, whose candidates tell."""
    vocab = logits.shape[1]
    rows = [i for i, s in enumerate(sampling) if s.top_p < 1.0 and s.min_p <= 0.0 and not 0 < s.top_k < vocab]
    mass = np.full(len(sampling), np.nan)
    if rows:
        part = logits if len(rows) == len(sampling) else logits[rows]
        mass[rows] = _weights(part, [sampling[i] for i in rows]).sum(dim=1, dtype=torch.float64).cpu().numpy()
    return mass


def _candidates(logits: Tensor, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The `count` highest logits of each row and their ids, (n, count), by logit descending, then id ascending."""
    if count == logits.shape[1] and logits.device.type == "cpu":
        return _sorted(logits.numpy())
    if count == logits.shape[1]:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values.double().cpu().numpy(), ids.cpu().numpy()
    values, ids = logits.topk(count, dim=1)
    high, low = values.double().cpu().numpy(), ids.cpu().numpy()
    order = np.lexsort((low, -high), axis=1)
    return np.take_along_axis(high, order, 1), np.take_along_axis(low, order, 1)


def _sorted(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A full sort, five times as fast as a stable sort of floats: by one integer made of the logit, so that a larger
    logit has a smaller integer, and the id."""
    bits = (logits + np.float32(0)).view(np.uint32)  # adding zero makes -0 equal to 0
    descending = np.where(bits >> np.uint32(31), bits, ~(bits | np.uint32(1 << 31)))
    keys = (descending.astype(np.uint64) << np.uint64(32)) | np.arange(logits.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    ids = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return np.take_along_axis(logits, ids, 1).astype(np.float64), ids


def _choose(
    logits: Tensor,
    sampling: Sequence[SamplingParams],
    noise: NDArray[np.float64],
    mass: NDArray[np.float64],
    count: int,
) -> NDArray[np.int64]:
    """The chosen token of each row, or -1 where `count` candidates are too few to know. `mass` as `_nucleus_mass`."""
    number, vocab = logits.shape
    everything = count == vocab
    values, ids = _candidates(logits, count)
    # Which of the tokens that tie with the last candidate were returned is unspecified: only those above it are known.
    known = np.full(number, count) if everything else (values > values[:, -1:]).sum(axis=1)
    places = np.arange(count)
    temperature = np.array([s.temperature for s in sampling])[:, None]
    weights = np.exp((values - values[:, :1]) / temperature) * (places < known[:, None])
    upto = weights.cumsum(axis=1)

    min_p = np.array([s.min_p for s in sampling])
    top_k = np.array([s.top_k if 0 < s.top_k < vocab else vocab for s in sampling])
    top_p = np.array([s.top_p for s in sampling])
    kept = ((weights >= min_p[:, None]) & (places < known[:, None])).sum(axis=1)
    complete = everything | (kept < known)
    kept = np.where(kept >= top_k, top_k, kept)
    complete |= kept == top_k
    total = upto[np.arange(number), np.maximum(kept, 1) - 1]
    nucleus = top_p < 1.0
    by_mass = ~complete & ~np.isnan(mass)
    total[by_mass] = mass[by_mass]
    complete |= by_mass & (upto[:, -1] >= top_p * total)
    inside = (upto < (top_p * total)[:, None]).sum(axis=1) + 1
    kept = np.where(nucleus, np.minimum(inside, np.maximum(kept, 1)), np.maximum(kept, 1))
    target = noise * upto[np.arange(number), kept - 1]
    place = np.minimum((upto <= target[:, None]).sum(axis=1), kept - 1)
    tokens: NDArray[np.int64] = np.where(complete, ids[np.arange(number), place], -1)
    return tokens
