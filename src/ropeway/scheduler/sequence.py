"""One request inside the scheduler, and the only way its state may change."""

from __future__ import annotations

from enum import Enum

from ropeway.contract import FinishReason, GenerateRequest


class State(Enum):
    """Where a sequence is. Everything else about it is a field, not a state."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


_ARROWS = {
    (State.QUEUED, State.RUNNING),  # admitted
    (State.RUNNING, State.QUEUED),  # preempted
    (State.RUNNING, State.FINISHED),
    (State.QUEUED, State.FINISHED),  # cancelled or timed out before it boarded
}


class Sequence:
    """A request's tokens and what has been done about them.

    `tokens` are known, the first `computed` of them have KV (or are in a step under way), `pending` more are being
    sampled, and the first `committed` have come back from the device. `keys` name its full blocks, of which
    `published` have been offered to the prefix cache. `epoch` counts admissions: a result of an old one is void.
    """

    __slots__ = (
        "arrival", "blocks", "cached", "committed", "computed", "epoch", "finish", "first_scheduled", "first_token",
        "keys", "number", "pending", "preemptions", "prompt_len", "published", "request", "slot", "state", "tokens",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, number: int, arrival: float) -> None:
        self.request = request
        self.number = number  # order of arrival; breaks every tie
        self.arrival = arrival
        self.tokens = list(request.tokens)
        self.prompt_len = len(self.tokens)
        self.state = State.QUEUED
        self.computed = 0
        self.pending = 0
        self.committed = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.published = 0
        self.slot = -1
        self.epoch = 0
        self.preemptions = 0
        self.cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.finish: FinishReason | None = None

    @property
    def rid(self) -> int:
        return self.request.rid

    @property
    def want(self) -> int:
        """Tokens to compute until everything known, or about to be known, is computed."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def end(self) -> int:
        """The total length at which the request is done whatever it says."""
        return self.prompt_len + self.request.sampling.max_tokens

    def move(self, state: State) -> None:
        """The only writer of `state`. Raises RuntimeError for an arrow that does not exist."""
        if (self.state, state) not in _ARROWS:
            raise RuntimeError(f"request {self.rid} cannot go from {self.state.value} to {state.value}")
        self.state = state
