"""One request inside the scheduler, and the only way its state may change."""

from __future__ import annotations

from enum import Enum

from ropeway.contract import FinishReason, GenerateRequest


class State(Enum):
    """Where a sequence is. It is admitted and preempted any number of times, and finishes once, from wherever it is.
    Everything else about it is a field, not a state."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request's tokens and what has been done about them.

    `known` counts its tokens and those that are being sampled: what there is to compute. The first `computed` of them
    have KV (or are in a step under way). `keys` name its full blocks, of which `published` have come back from the
    device and been offered to the prefix cache. Below `due` tokens a commit notes nothing but a new token. Up to `room`
    it may compute in the blocks that it holds. `epoch` counts its turns on board: a result of an old one is void.
    `urgency` is the request's, until it has waited for so long that it counts as interactive (`WaitingRoom.age`).
    """

    __slots__ = (
        "arrival", "blocks", "cached", "computed", "due", "end", "ends", "epoch", "finish", "first_scheduled",
        "first_token", "keys", "known", "number", "passed", "preemptions", "prompt_len", "published", "request", "rid",
        "room", "shared", "shares", "slot", "state", "tokens", "urgency",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, number: int, now: float, longest: int, caching: bool = True) -> None:
        """`longest` bounds the total length: the model's context. `caching` says whether there is a prefix cache."""
        sampling = request.sampling
        self.request = request
        self.rid = request.rid
        self.number = number  # order of arrival; breaks every tie
        self.arrival = now
        self.urgency = int(request.urgency)
        self.tokens = list(request.tokens)
        self.prompt_len = self.known = len(self.tokens)
        self.end = min(self.prompt_len + sampling.max_tokens, longest + bool(request.pooling))  # done there in any case
        self.ends = frozenset(request.eos_ids + sampling.stop_token_ids)
        self.state = State.QUEUED
        self.computed = self.published = self.due = self.room = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.shares = caching and request.cache  # whether it takes from the prefix cache, and leaves its blocks there
        self.shared = 0  # of its blocks, how many somebody else held when it boarded
        self.slot = -1
        self.epoch = 1
        self.preemptions = 0
        self.passed = 0  # how many have boarded before it although it stood first
        self.cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.finish: FinishReason | None = None

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def move(self, state: State) -> None:
        """The only writer of `state`. Raises RuntimeError for what cannot follow."""
        if self.state in (state, State.FINISHED):
            raise RuntimeError(f"request {self.rid} cannot go from {self.state.value} to {state.value}")
        self.state = state
