"""What a request may do to its own logits before a token is chosen: bias, minimum length, penalties.

Order and meanings are vLLM's. Only rows that ask for it come here, so that the others pay nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import SamplingParams
from ropeway.errors import RequestError


class History:
    """Which tokens a sequence has, counted as they come: the penalties then cost the number of different tokens."""

    def __init__(self, tokens: NDArray[np.int32], prompt_len: int) -> None:
        self._seen = _Counts(tokens)
        self._output = _Counts(tokens[prompt_len:])

    def append(self, token: int) -> None:
        self._seen.add(token)
        self._output.add(token)

    @property
    def seen(self) -> NDArray[np.int64]:
        """Different tokens of prompt and output."""
        return self._seen.ids

    @property
    def output(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Different tokens of the output, and how often each occurs."""
        return self._output.ids, self._output.counts


class _Counts:
    def __init__(self, tokens: NDArray[np.int32]) -> None:
        ids, counts = np.unique(tokens, return_counts=True)
        self._place = {int(token): place for place, token in enumerate(ids)}
        self._size = len(ids)
        self._ids = np.concatenate([ids.astype(np.int64), np.zeros(64, np.int64)])
        self._counts = np.concatenate([counts.astype(np.int64), np.zeros(64, np.int64)])

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1


def has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def wants_adjusting(sampling: SamplingParams, generated: int) -> bool:
    """Whether the next token's logits of a request must go through `adjust`."""
    return bool(sampling.logit_bias) or generated < sampling.min_tokens or has_penalties(sampling)


def adjust(
    row: Tensor, sampling: SamplingParams, generated: int, eos_ids: tuple[int, ...], history: History | None
) -> None:
    """Change `row` (vocab,) float32 in place. `history` is needed if the request has penalties.

    Raises RequestError for a bias on a token outside the vocabulary.
    """
    vocab, device = row.shape[0], row.device
    if sampling.logit_bias:
        ids = list(sampling.logit_bias)
        if min(ids) < 0 or max(ids) >= vocab:
            raise RequestError(f"logit_bias names a token outside the vocabulary of {vocab}.", param="logit_bias")
        row[torch.tensor(ids, device=device)] += torch.tensor(list(sampling.logit_bias.values()), device=device)
    if generated < sampling.min_tokens:
        ends = [i for i in {*eos_ids, *sampling.stop_token_ids} if 0 <= i < vocab]
        row[torch.tensor(ends, dtype=torch.int64, device=device)] = -torch.inf
    if history is None or not has_penalties(sampling):
        return
    if sampling.repetition_penalty != 1.0:
        seen = torch.from_numpy(history.seen).to(device)
        values = row[seen]
        factor = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    ids_of, counts_of = history.output
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        output, counts = torch.from_numpy(ids_of).to(device), torch.from_numpy(counts_of).to(device)
        row[output] -= sampling.frequency_penalty * counts + sampling.presence_penalty
