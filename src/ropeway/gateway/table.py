"""The table of routes: which deployments there are, and which requests go where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ropeway.api.state import unknown_model
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import RequestError
from ropeway.gateway.balance import Policy


@dataclass(frozen=True, kw_only=True)
class Local:
    """A model that this server runs. `server` has the server's settings with those of its model in their place.

    `start` says when it is loaded: with the server, or for the first request. `warm_up` are texts that are computed
    before it takes requests, and stay in its prefix cache.
    """

    engine: EngineConfig
    server: ServerConfig
    start: Literal["eager", "lazy"] = "eager"
    warm_up: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Remote:
    """An OpenAI-compatible server at `url`, where the model is called `model`. Times are seconds.

    `timeout` bounds a whole answer, `first_byte_timeout` the time until a stream begins, `idle_timeout` that between
    two pieces of it.
    """

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    timeout: float = 600.0
    connect_timeout: float = 5.0
    first_byte_timeout: float = 60.0
    idle_timeout: float = 60.0


Spec = Local | Remote
Weights = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Requests of these tenants (any if there are none) with a prompt from `least` to `most` tokens (None: any) go to
    `targets`, deployments by weight."""

    tenants: frozenset[str] = frozenset()
    least: int | None = None
    most: int | None = None
    targets: Weights

    def fits(self, tenant: str, tokens: int) -> bool:
        if self.tenants and tenant not in self.tenants:
            return False
        return (self.least is None or tokens >= self.least) and (self.most is None or tokens <= self.most)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where requests for the model `name` go: by the first of `rules` that fits, and if none does to `targets`. When
    none of those can answer, to the first of `fallbacks` that can."""

    name: str
    targets: Weights
    rules: Sequence[Rule] = ()
    fallbacks: Sequence[str] = ()
    balance: Policy = "least_load"

    @property
    def main(self) -> str:
        """The deployment that most requests go to."""
        return max(self.targets, key=lambda name: self.targets[name])

    @property
    def counts(self) -> bool:
        """Whether it has to know how long a prompt is."""
        return any(rule.least is not None or rule.most is not None for rule in self.rules)

    @property
    def deployments(self) -> Iterator[str]:
        """All that it may lead to; some may come more than once."""
        yield from self.targets
        for rule in self.rules:
            yield from rule.targets
        yield from self.fallbacks

    def lead(self, tenant: str, tokens: int) -> tuple[Weights, bool]:
        """The deployments that share a request's load, and whether a rule of its own sent it there."""
        for rule in self.rules:
            if rule.fits(tenant, tokens):
                return rule.targets, True
        return self.targets, False


@dataclass(frozen=True, kw_only=True)
class Table:
    """`memory_gib` bounds what the local engines take together; `start_timeout` is how many seconds a request waits for
    a model to be loaded."""

    deployments: Mapping[str, Spec]
    routes: Mapping[str, Route]
    memory_gib: float | None = None
    start_timeout: float = 120.0

    def route(self, model: str | None) -> Route:
        """Raises RequestError if one must be named and is not, UnknownModelError if there is none of that name."""
        if model is None and len(self.routes) == 1:
            return next(iter(self.routes.values()))
        if model is None:
            raise RequestError("This server has several models; name one of them. See /v1/models.", param="model")
        if model not in self.routes:
            raise unknown_model(model, list(self.routes))
        return self.routes[model]
