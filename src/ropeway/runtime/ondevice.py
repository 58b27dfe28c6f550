"""Tokens that never leave the device: chosen there, and read there by the step after.

A step may be planned and launched before the one before it has told its tokens. Where such a token goes into the model
the host writes -1 - slot for it, and `fill` puts the slot's newest token there. The host hears of the token when it
has been fetched.

That works for sequences whose next token depends on nothing but logits, parameters and noise. Whoever has a grammar,
a mask, penalties, a bias, bad words, or asks for log probabilities, is the host's (see `ropeway.runtime.sampler`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.runtime.device_sampler import Sample
from ropeway.runtime.draw import GREEDY_BELOW
from ropeway.runtime.lane import Fetch, Lane
from ropeway.runtime.logits import has_penalties
from ropeway.runtime.noise import uniforms
from ropeway.runtime.slots import Slot, Slots


def wish_of(seat: Slot) -> tuple[float, float, float, float] | None:
    """temperature, top_p, min_p and top_k of a sequence, as the device takes them; None if the host must choose its
    tokens."""
    s = seat.sampling
    steered = s.grammar or s.allowed_token_ids or s.logit_bias or s.bad_word_ids or has_penalties(s)
    if steered or s.logprobs is not None or not isinstance(seat.seed, int):
        return None
    return (s.temperature if s.temperature >= GREEDY_BELOW else 0.0, s.top_p, s.min_p, float(max(0, s.top_k)))


def alone(seat: Slot) -> bool:
    """Whether the device can choose the next token of a sequence by itself."""
    return seat.wish is not None and seat.generated >= seat.sampling.min_tokens


class DeviceTokens:
    """`newest` (slots + 1,) int64 is each slot's newest token as far as the device has chosen it. The last place is
    nobody's: rows that only pad a step write there."""

    def __init__(self, slots: Slots, lane: Lane, sample: Sample) -> None:
        self.slots, self.lane, self._sample = slots, lane, sample
        self.nobody = slots.tokens.shape[0]
        self.newest = torch.zeros(self.nobody + 1, dtype=torch.int64, device=lane.device)

    def board(self, seat: Slot) -> None:
        """A sequence has taken a seat."""
        seat.wish = wish_of(seat)

    def fill(self, token_ids: Tensor) -> Tensor:
        """`token_ids` (T,) with the newest token of slot s for -1 - s. After a row that has failed that is any token:
        nobody will want what comes of it."""
        newest = self.newest[(-1 - token_ids).clamp(min=0)].clamp(min=0)
        return torch.where(token_ids < 0, newest, token_ids)

    def wishes(self, numbers: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """How the slots `numbers` choose their next tokens: slots and top_k (2, R), and temperature, top_p, min_p and
        noise (4, R). What the host chooses is greedy here."""
        seats = [self.slots.taken[number] for number in numbers]
        wishes = np.array([seat.wish or _GREEDY for seat in seats], dtype=np.float64).T
        noise = np.zeros(len(seats))
        drawn = np.flatnonzero(wishes[0]).tolist()
        if drawn:
            noise[drawn] = uniforms([seats[i].seed for i in drawn], [seats[i].generated for i in drawn])
        whole = np.array([numbers, wishes[3]], dtype=np.int64)
        return whole, np.vstack([wishes[:3], noise])

    def choose(self, logits: Tensor, numbers: Sequence[int]) -> Fetch:
        """The next tokens of the slots `numbers`, whose logits (R, vocab) float32 these are, on their way."""
        whole, real = self.lane.stage(*self.wishes(numbers))
        return self.lane.fetch(self.draw(logits, whole[0], whole[1], *real))

    def draw(
        self, logits: Tensor, slots: Tensor, top_k: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor,
        noise: Tensor,
    ) -> Tensor:  # fmt: skip
        """The same with everything on the device: tokens (R,), which are the newest of their `slots` from now on."""
        tokens = self._sample(logits, temperature, top_k, top_p, min_p, noise)
        self.newest.scatter_(0, slots, tokens)
        return tokens


_GREEDY = (0.0, 1.0, 0.0, 0.0)
