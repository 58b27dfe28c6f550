"""From rows of a plan to the tensors of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ropeway.contract import Row
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.lane import Lane
from ropeway.runtime.slots import Slots


def gather(rows: Sequence[Row], slots: Slots, lane: Lane) -> BatchInputs:
    """The inputs of a step that computes `rows`, whose slots already have their new blocks. Tokens that are still being
    chosen (see `Slots.expect`) are in `token_ids` as the slots have them.

    Every array is made anew: slots and tables may change while the step is under way."""
    size, number = slots.block_size, len(rows)
    taken = [slots.taken[row.slot] for row in rows]
    seats = np.fromiter((row.slot for row in rows), np.int64, number)
    starts = np.fromiter((row.start for row in rows), np.int64, number)
    counts = np.fromiter((row.count for row in rows), np.int64, number)
    tails = np.fromiter((seat.tail(row) for seat, row in zip(taken, rows, strict=True)), np.int64, number)
    seconds = [seat.second for seat in taken]
    lengths = starts + counts
    cu_q = np.zeros(number + 1, np.int64)
    np.cumsum(counts, out=cu_q[1:])
    positions = np.arange(cu_q[-1]) + np.repeat(starts - cu_q[:-1], counts)
    seat_of = np.repeat(seats, counts)
    index, offset = np.divmod(positions, size)
    staged = lane.stage(
        slots.tokens[seat_of, positions].astype(np.int64),
        positions,
        cu_q.astype(np.int32),
        starts.astype(np.int32),
        lengths.astype(np.int32),
        tables_of(slots, seats, -(-lengths // size)),
        (slots.tables[seat_of, index] * size + offset).astype(np.int32),
        last_of_each(cu_q[1:], tails),
        *([np.array(seconds, np.int32)] if any(seconds) else []),
    )
    token_ids, places, first, begun, ends, tables, write_slots, logits_rows, *rest = staged
    return BatchInputs(
        token_ids=token_ids,
        positions=places,
        cu_q=first,
        starts=begun,
        lengths=ends,
        block_tables=tables,
        write_slots=write_slots,
        logits_rows=logits_rows,
        max_count=int(counts.max()),
        max_length=int(lengths.max()),
        second=rest[0] if rest else None,
    )


def tables_of(slots: Slots, seats: NDArray[np.int64], needed: NDArray[np.int64]) -> NDArray[np.int32]:
    """The first `needed` blocks of each of `seats`, as wide as the longest, -1 behind."""
    width = int(needed.max())
    tables = np.where(np.arange(width) < needed[:, None], slots.tables[seats, :width], np.int32(-1))
    return tables.astype(np.int32, copy=False)


def last_of_each(ends: NDArray[np.int64], tails: NDArray[np.int64]) -> NDArray[np.int64]:
    """The last tails[r] indices before ends[r], for each row r."""
    after = np.cumsum(tails)
    return np.arange(after[-1]) + np.repeat(ends - after, tails)
