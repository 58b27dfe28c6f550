"""The runner's memory of each running sequence: its tokens, its block table, and how it samples.

A slot is a row of permanent arrays, so that gathering a step is a few indexed reads whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ropeway.contract import Admit, Row, SamplingParams
from ropeway.errors import EngineError
from ropeway.runtime.logits import History
from ropeway.runtime.pooling import Pool


@dataclass
class Slot:
    """Who sits in a slot. `known` counts its tokens, `blocks` the filled part of its block table.

    `fault` is set if the sequence cannot be computed at all; every row of it then fails with that message.
    `history` is kept only for sequences with penalties, from their first sampled token on. `pool` is there if a vector
    is wanted instead of tokens, `second` as in `GenerateRequest`.

    `mask` says which tokens may come next, None for all: token i may if bit i % 32 of word i // 32 is set. The sampler
    reads it when it chooses. It is `allowed`, the request's `allowed_token_ids`, from the start, and under a grammar
    what the `Guide` (see `ropeway.runtime.sampler`) answers for each token, cut to `allowed`. `matcher` is the guide's
    own memory of the sequence, which goes with the seat. `wish` is there if the device can choose its tokens by itself
    (see `ropeway.runtime.ondevice`).
    """

    rid: int
    epoch: int
    prompt_len: int
    known: int
    blocks: int
    sampling: SamplingParams
    eos_ids: tuple[int, ...]
    seed: int
    fault: str | None = None
    history: History | None = None
    allowed: NDArray[np.uint32] | None = None
    mask: NDArray[np.uint32] | None = None
    matcher: object | None = None
    pool: Pool | None = None
    second: int = 0
    wish: tuple[float, float, float, float] | None = None

    def tail(self, row: Row) -> int:
        """Of how many positions at the end of `row`, which is this sequence's, the final states are wanted."""
        if self.pool is not None:
            return self.pool.tail(row)
        return row.count if self.told(row) else int(row.emit)

    def told(self, row: Row) -> int:
        """Of how many positions at the beginning of `row` the logits tell how likely the prompt's next token was, which
        the request asks for."""
        if self.sampling.prompt_logprobs is None:
            return 0
        return max(0, min(row.start + row.count, self.prompt_len - 1) - row.start)

    @property
    def generated(self) -> int:
        """Number of output tokens so far: the index of the next one."""
        return self.known - self.prompt_len


def bitmask(tokens: Sequence[int], vocab: int) -> NDArray[np.uint32]:
    """The mask (see `Slot.mask`) that lets `tokens` alone pass."""
    ids = np.asarray(tokens, dtype=np.int64)
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return words


class Slots:
    """Up to `max_slots` sequences of up to `max_model_len` tokens.

    `tokens` is (max_slots, max_model_len + 1) int32: the token that ends a full sequence is kept as well.
    `tables` is (max_slots, blocks of a full sequence) int32. Both are touched only as far as they are used.
    """

    def __init__(self, max_slots: int, max_model_len: int, block_size: int, num_blocks: int, vocab: int) -> None:
        self.max_model_len, self.block_size, self.num_blocks, self.vocab = max_model_len, block_size, num_blocks, vocab
        self.tokens = np.zeros((max_slots, max_model_len + 1), dtype=np.int32)
        self.tables = np.zeros((max_slots, -(-max_model_len // block_size)), dtype=np.int32)
        self.taken: dict[int, Slot] = {}

    def release(self, slot: int) -> None:
        self.taken.pop(slot, None)

    def admit(self, admit: Admit, seed: int) -> None:
        """Seat a sequence. One that cannot be computed is seated all the same, with its fault."""
        seat = Slot(
            rid=admit.rid,
            epoch=admit.epoch,
            prompt_len=admit.prompt_len,
            known=len(admit.tokens),
            blocks=0,
            sampling=admit.sampling,
            eos_ids=admit.eos_ids,
            seed=seed,
            pool=Pool(admit.pooling, admit.prompt_len) if admit.pooling else None,
            second=admit.second,
        )
        self.taken[admit.slot] = seat
        tokens = np.asarray(admit.tokens, dtype=np.int64)
        if not 0 < len(tokens) <= self.max_model_len:
            seat.fault = f"the sequence has {len(tokens)} tokens; 1 to {self.max_model_len} can be computed"
        elif tokens.min() < 0 or tokens.max() >= self.vocab:
            seat.fault = f"a token id is outside the model's vocabulary of {self.vocab}"
        elif any(not 0 <= token < self.vocab for token in admit.sampling.allowed_token_ids):
            seat.fault = f"allowed_token_ids names a token outside the model's vocabulary of {self.vocab}"
        else:
            if admit.sampling.allowed_token_ids:
                seat.mask = seat.allowed = bitmask(admit.sampling.allowed_token_ids, self.vocab)
            self.tokens[admit.slot, : len(tokens)] = tokens
            self._extend(admit.slot, seat, admit.blocks)

    def extend(self, row: Row) -> None:
        """Append the row's new blocks to its slot's table. Raises EngineError if the row cannot be computed."""
        seat = self.taken.get(row.slot)
        if seat is None or (seat.rid, seat.epoch) != (row.rid, row.epoch):
            raise EngineError(f"Slot {row.slot} does not hold request {row.rid} in its epoch {row.epoch}.")
        self._extend(row.slot, seat, row.new_blocks)
        end = row.start + row.count
        if seat.fault is None and not (row.start >= 0 and row.count > 0 and end <= seat.known):
            raise EngineError(f"The row asks for tokens [{row.start}, {end}) but {seat.known} are known.")
        if seat.fault is None and end > seat.blocks * self.block_size:
            raise EngineError(f"The row ends at token {end} but has {seat.blocks} blocks of {self.block_size} tokens.")
        if seat.fault is not None:
            raise EngineError(f"The request cannot be computed: {seat.fault}.")

    def append(self, slot: int, token: int) -> None:
        """Add an output token. At the length limit it is dropped: it ends the sequence and is never computed."""
        seat = self.taken[slot]
        if seat.known < self.tokens.shape[1]:
            self.tokens[slot, seat.known] = token
            seat.known += 1
        if seat.history is not None:
            seat.history.append(token)

    def expect(self, slot: int) -> int:
        """The device is choosing the next token of a slot, which counts as known from now on. -1 - slot stands in its
        place until `put` brings it. Returns its index in the sequence; at the length limit there is no place for it."""
        seat = self.taken[slot]
        index = seat.known
        if index < self.tokens.shape[1]:
            self.tokens[slot, index] = -1 - slot
            seat.known += 1
        return index

    def put(self, slot: int, seat: Slot, index: int, token: int) -> None:
        """A token that was expected has come, or a negative number in its place: then nothing more of the sequence can
        be computed. Nobody's if the `seat` for which it was chosen has been left."""
        if self.taken.get(slot) is not seat:
            return
        if token < 0:
            seat.fault = "no token could be chosen for it before"
        elif index < self.tokens.shape[1]:
            self.tokens[slot, index] = token

    def sequence(self, slot: int) -> NDArray[np.int32]:
        """The known tokens of a slot (a view)."""
        return self.tokens[slot, : self.taken[slot].known]

    def _extend(self, slot: int, seat: Slot, blocks: list[int]) -> None:
        if not blocks or seat.fault is not None:
            return
        end = seat.blocks + len(blocks)
        if end > self.tables.shape[1]:
            seat.fault = f"it was given {end} blocks; a full sequence has {self.tables.shape[1]}"
        elif min(blocks) < 0 or max(blocks) >= self.num_blocks:
            seat.fault = f"it was given a block outside the pool of {self.num_blocks}"
        else:
            self.tables[slot, seat.blocks : end] = blocks
            seat.blocks = end
