"""A comparison of static with continuous batching: what is asked of the simulator, and what it found."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_TOKENS = 16_384
"""Of all answers of a comparison together."""

MAX_ANSWER = 960
MAX_PROMPT = 1024


class Mix(Struct, frozen=True, kw_only=True):
    """Body of POST /ui/compare: the requests that both sides serve.

    Lengths are lognormal around the given means; `spread` is the standard deviation of their logarithm, 0 for equal
    ones. Without a `rate` all requests are there from the start.
    """

    requests: Annotated[int, Meta(ge=2, le=256)] = 64
    seats: Annotated[int, Meta(ge=1, le=64)] = 8
    prompt_tokens: Annotated[int, Meta(ge=1, le=512, description="Tokens of a prompt, on average.")] = 96
    answer_tokens: Annotated[int, Meta(ge=1, le=512, description="Tokens of an answer, on average.")] = 96
    spread: Annotated[float, Meta(ge=0, le=1.5, description="How much lengths differ.")] = 0.8
    rate: Annotated[float, Meta(ge=0.01, le=10_000, description="Requests a second.")] | None = None
    profile: Annotated[
        Literal["laptop-cpu", "h200-8b-estimate"], Meta(description="What a step costs: a profile of `ropeway sim`.")
    ] = "laptop-cpu"
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0


class Ride(Struct, frozen=True, kw_only=True):
    """One request. Times are seconds from the start; `first` and `last` are those of its first and last token."""

    seat: int
    arrived: float
    boarded: float
    first: float
    last: float
    prompt: int
    answer: int


class Side(Struct, frozen=True, kw_only=True):
    """One way of batching. `occupancy` is the share of the seats' time, while there was work, in which they computed.
    `output_rate` is tokens of answers a second; times to the first token and of whole answers are seconds."""

    seconds: float
    steps: int
    output_rate: float
    occupancy: float
    ttft_p50: float
    ttft_p99: float
    e2e_mean: float
    e2e_p99: float
    rides: list[Ride]


class Comparison(Struct, frozen=True, kw_only=True):
    """The same requests served both ways by the server's own scheduler under a virtual clock. `basis` tells whether the
    costs of a step were measured on `machine` or follow from data sheets."""

    object: Literal["comparison"] = "comparison"
    machine: str
    model: str
    basis: Literal["measured", "estimate"]
    seats: int
    static: Side
    continuous: Side
