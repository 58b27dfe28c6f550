"""Steps in which every row computes one token and gets the next, recorded once for each number of rows and replayed.

Launching the few hundred kernels of a step one by one takes the host longer than a GPU needs to run them when there
are few rows. A recorded step (a CUDA graph) is launched as one. It works on memory of its own, into which the inputs of
a step are copied, and for as many rows as it was recorded with: the rest are nobody's, with one token in a block that
no sequence has (`KVStore.scratch`).

Only what the host may not wait for is recorded: from the inputs to the tokens that the device chooses. Rows whose
tokens the host chooses are in the step as well. Their final states are kept, and their logits computed from them again,
because logits of all rows for each size would fill gigabytes.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropeway.contract import Row
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.gather import tables_of
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.lane import Fetch, Lane
from ropeway.runtime.ondevice import DeviceTokens

PATIENCE = 32
"""Steps of a size that are launched kernel by kernel before it is recorded even though there is no pause. By then they
have cost about what recording costs."""
QUIET = 0.02
"""Seconds without a step after which the device counts as idle."""
_log = logging.getLogger(__name__)


class Model(Protocol):
    """What is recorded."""

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor: ...

    def logits(self, states: Tensor) -> Tensor: ...


def sizes(most: int) -> tuple[int, ...]:
    """The numbers of rows that are recorded for up to `most`, the largest first: 1, 2, 4, 8, and then in steps of a
    quarter of the power of two below, so that at most a fifth of a larger step is padding."""
    found = [size for size in (1, 2, 4, 8) if size < most]
    while found and found[-1] >= 8 and (size := found[-1] + max(8, (1 << found[-1].bit_length() - 1) // 4)) < most:
        found.append(size)
    return (most, *reversed(found))


class Columns:
    """The inputs of R rows of one token as views of (10, R) int64, an array or a tensor, so that one copy brings them
    all: `token_ids`, `positions`, `slots`, `top_k` int64; `temperature`, `top_p`, `min_p`, `noise` float64; `starts`,
    `lengths`, `write_slots` int32."""

    ROWS = 10

    def __init__(self, data: Any) -> None:
        size = data.shape[1]
        whole, real = (torch.int32, torch.float64) if isinstance(data, Tensor) else (np.int32, np.float64)
        self.token_ids, self.positions, self.slots, self.top_k = data[0], data[1], data[2], data[3]
        self.temperature, self.top_p, self.min_p, self.noise = (data[row].view(real) for row in range(4, 8))
        spans, places = data[8].view(whole), data[9].view(whole)
        self.starts, self.lengths, self.write_slots = spans[:size], spans[size:], places[:size]


class Graphs:
    """Recorded steps of `model` for up to `most` rows. `hidden` and `dtype` are those of its final states.

    `missing` are the sizes that are still to be recorded, the largest first: the smaller ones then find room in the
    memory that the larger have taken. If one cannot be recorded no further ones are tried.
    """

    def __init__(
        self, model: Model, kv: KVStore, tokens: DeviceTokens, lane: Lane, most: int, hidden: int, dtype: torch.dtype
    ) -> None:
        self.model, self.kv, self.tokens, self.lane, self.slots = model, kv, tokens, lane, tokens.slots
        self.missing = list(sizes(most))
        self.sizes = tuple(reversed(self.missing))
        self._ready: dict[int, Callable[[], None]] = {}
        self._waited = dict.fromkeys(self.sizes, 0)
        device, width = lane.device, self.slots.tables.shape[1]
        self._columns = torch.zeros((Columns.ROWS, most), dtype=torch.int64, device=device)
        self._tables = torch.full((most, width), kv.scratch, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, dtype=torch.int64, device=device)
        self._firsts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._states = torch.zeros((most, hidden), dtype=dtype, device=device)
        self._chosen = torch.zeros(most, dtype=torch.int64, device=device)

    def load(self, rows: Sequence[Row]) -> Callable[[], None] | None:
        """Bring the inputs of `rows`. Returns what launches their step, None if there is no graph for it."""
        size = self._size(rows)
        if size is None:
            return None
        if size not in self._ready:
            self._waited[size] += 1
            if size not in self.missing or self._waited[size] < PATIENCE:
                return None
            self.capture(size)
            if size not in self._ready:
                return None
        self._load(rows, size)
        return self._ready[size]

    def fetch(self, count: int) -> Fetch:
        """The tokens of the first `count` rows of the step that was launched last."""
        return self.lane.fetch(self._chosen[:count])

    def states(self, places: Sequence[int]) -> Tensor:
        """Final states (n, hidden) of the rows at `places` of the step that was launched last, for keeps."""
        (index,) = self.lane.stage(np.array(places, dtype=np.int64))
        return self._states[index]

    def capture(self, size: int | None = None) -> bool:
        """Record the steps of `size` rows (default: the largest that is missing). False if nothing is missing then."""
        if self.missing:
            size = size or self.missing[0]
            self.missing.remove(size)
            self._load([], size)
            try:
                self._ready[size] = self.lane.capture(self._step(size))
            except Exception as error:
                self.missing.clear()
                _log.warning(
                    "Steps of %d rows could not be recorded (%s: %s). Those of %s are replayed, others are launched "
                    "kernel by kernel. Use --enforce-eager to do without recording.",
                    size, type(error).__name__, error, ", ".join(map(str, sorted(self._ready))) or "no number",
                )  # fmt: skip
        return bool(self.missing)

    def _size(self, rows: Sequence[Row]) -> int | None:
        """The size that `rows` are padded to, None if they are not of the kind that is recorded."""
        if len(rows) > self.sizes[-1]:
            return None
        taken = self.slots.taken
        for row in rows:
            if row.count != 1 or not row.emit:
                return None
            seat = taken[row.slot]
            if seat.pool is not None or seat.told(row):
                return None
        return self.sizes[bisect_left(self.sizes, len(rows))]

    def _load(self, rows: Sequence[Row], size: int) -> None:
        """Copy the inputs of `rows`, padded to `size`, to where the recorded steps look for them."""
        data, tables = self._gather(rows, size)
        fresh, wide = self.lane.stage(data, tables)
        self._columns[:, :size].copy_(fresh)
        self._tables[:size, : tables.shape[1]].copy_(wide)

    def _gather(self, rows: Sequence[Row], size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        slots, number, scratch = self.slots, len(rows), self.kv.scratch
        data = np.zeros((Columns.ROWS, size), np.int64)
        columns = Columns(data)
        columns.slots[number:] = self.tokens.nobody
        columns.lengths[number:] = 1
        columns.write_slots[number:] = scratch * slots.block_size
        columns.top_p[number:] = 1.0
        if not rows:
            return data, np.full((size, 1), scratch, np.int32)
        seats = np.fromiter((row.slot for row in rows), np.int64, number)
        starts = np.fromiter((row.start for row in rows), np.int64, number)
        columns.token_ids[:number] = slots.tokens[seats, starts]
        columns.positions[:number] = columns.starts[:number] = starts
        columns.lengths[:number] = starts + 1
        block = slots.tables[seats, starts // slots.block_size].astype(np.int64)
        columns.write_slots[:number] = block * slots.block_size + starts % slots.block_size
        whole, real = self.tokens.wishes(seats.tolist())
        columns.slots[:number], columns.top_k[:number] = whole
        columns.temperature[:number], columns.top_p[:number], columns.min_p[:number], columns.noise[:number] = real
        own = tables_of(slots, seats, starts // slots.block_size + 1)
        tables = np.full((size, own.shape[1]), scratch, np.int32)
        tables[:number] = own
        return data, tables

    def _step(self, size: int) -> Callable[[], None]:
        """What is recorded: a step of `size` rows from and to memory that stays where it is."""
        columns = Columns(self._columns[:, :size])
        inputs = BatchInputs(
            token_ids=columns.token_ids,
            positions=columns.positions,
            cu_q=self._firsts[: size + 1],
            starts=columns.starts,
            lengths=columns.lengths,
            block_tables=self._tables[:size],
            write_slots=columns.write_slots,
            logits_rows=self._rows[:size],
            max_count=1,
            max_length=self._tables.shape[1] * self.slots.block_size,
        )

        def step() -> None:
            known = replace(inputs, token_ids=self.tokens.fill(columns.token_ids))
            states = self.model.hidden(known, self.kv.data)
            self._states[:size].copy_(states)
            tokens = self.tokens.draw(
                self.model.logits(states), columns.slots, columns.top_k, columns.temperature, columns.top_p,
                columns.min_p, columns.noise,
            )  # fmt: skip
            self._chosen[:size].copy_(tokens)

        return step


class Background:
    """A thread that records while nobody waits: `capture` (see `Runner.capture`) is called each time that the device
    may be idle, until it says that nothing is missing."""

    def __init__(self, capture: Callable[[float], bool]) -> None:
        self._capture = capture
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graphs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(QUIET):
            if not self._capture(QUIET):
                return
