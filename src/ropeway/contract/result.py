"""What an executor answers for one step."""

from __future__ import annotations

from msgspec import Struct


class RowFault(Struct, frozen=True):
    """Row number `row` of the plan failed alone; `code` is an error code of `ropeway.errors`."""

    row: int
    code: str
    message: str


class StepResult(Struct, frozen=True):
    """`tokens[i]` are the tokens that row i of the plan emitted: empty, one, or several with a drafter.
    `seconds` is the executor's own time for the step."""

    step: int
    tokens: list[list[int]]
    faults: list[RowFault] = []
    seconds: float = 0.0


class ExecutorInfo(Struct, frozen=True, kw_only=True):
    """The resources that an executor offers, fixed for its life.

    `depth` is how many plans may be in flight. `notes` are sentences for the start-up banner, in order: why this
    device, dtype, attention back end, number of blocks.
    """

    model: str
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_slots: int
    max_model_len: int
    vocab_size: int
    depth: int = 1
    attention: str = ""
    threads: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    notes: list[str] = []
