"""Bodies and answers of `/admin/canary`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

from ropeway.experiment import Analysis

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1, description="Share of the keys that the canary gets, 0 to 1.")]
Phase: TypeAlias = Literal["running", "stopped", "rolled_back", "promoted"]


class CanaryStart(Struct, frozen=True, kw_only=True):
    """Body of PUT /admin/canary/{route}: give a share of the route's traffic to another deployment."""

    canary: Annotated[Name, Meta(description="The deployment to try.")]
    control: (
        Annotated[Name, Meta(description="What it is compared with; where the route leads now unless given.")] | None
    ) = None
    weight: Share = 0.05
    max_regression: Annotated[
        float,
        Meta(ge=0.01, le=10, description="Stop it when its times are proven longer, by this ratio or more."),
    ] = 0.1
    max_error_increase: Annotated[
        float,
        Meta(ge=0.0001, le=1, description="Stop it when it is proven to fail more, by this share of answers or more."),
    ] = 0.01
    alpha: Annotated[
        float, Meta(ge=1e-6, le=0.2, description="The chance that one which is no worse is ever stopped.")
    ] = 0.01
    min_samples: Annotated[
        int, Meta(ge=30, le=1_000_000, description="Answers of each side before times and rates are judged.")
    ] = 50


class CanaryChange(Struct, frozen=True, kw_only=True):
    """Body of PATCH /admin/canary/{route}: another weight, or the end of it."""

    weight: Share | None = None
    state: (
        Annotated[
            Literal["promoted", "rolled_back"],
            Meta(description="All traffic to the canary, or all to the control. Either can be undone by the other."),
        ]
        | None
    ) = None


class CanaryEvent(Struct, frozen=True):
    """What happened to a canary, and when (Unix time)."""

    at: float
    what: str


class CanaryState(Struct, frozen=True, kw_only=True):
    """A canary. `analysis` is of the time since `since` (Unix time), when its weight was last set; `trial` counts the
    weights. `stopped` is what the server did by itself, for `reason`."""

    route: str
    control: str
    canary: str
    state: Phase
    weight: float
    trial: int
    since: float
    reason: str | None
    max_regression: float
    max_error_increase: float
    analysis: Analysis
    events: list[CanaryEvent] = field(default_factory=list)


class CanaryList(Struct, frozen=True):
    """The canaries of all routes, also those that have ended."""

    data: list[CanaryState]
