"""Who answers a request next: the route's memory, and the order in which deployments are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ropeway.errors import OverloadedError
from ropeway.gateway.asked import Asked
from ropeway.gateway.balance import Balance, Candidate
from ropeway.gateway.breaker import RetryBudget
from ropeway.gateway.deployment import Deployment
from ropeway.gateway.outcome import Outcome, Splitter
from ropeway.gateway.table import Route, Weights


class Way:
    """A route, its turns, and its budget of retries."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.balance = Balance(route.balance)
        self.budget = RetryBudget()
        self.retries = 0


@dataclass(frozen=True)
class Going:
    """One request on its way: what it asks, and who may answer, `targets` by their weights.

    A splitter goes before the weights, and the route's fallbacks come after them.
    """

    way: Way
    asked: Asked
    targets: Weights
    splitter: Splitter | None
    deployments: Mapping[str, Deployment]

    @cached_property
    def split(self) -> str | None:
        """Where the splitter wants it to go."""
        return self.splitter.choose(self.asked.key) if self.splitter is not None else None

    @property
    def names(self) -> list[str]:
        """All that may answer, in order."""
        split = [self.split] if self.split is not None else []
        return list(dict.fromkeys([*split, *self.targets, *self.way.route.fallbacks]))

    def first(self) -> Deployment:
        """Whom to ask. Raises OverloadedError with everybody's reasons if nobody can be asked."""
        found = self.after(())
        if found is None:
            those = [self.deployments[name] for name in self.names]
            reasons = "; ".join(f"{one.name}: {one.blocked}" for one in those if one.blocked)
            raise OverloadedError(
                f"No deployment of `{self.way.route.name}` takes requests now ({reasons}). Retry later.",
                retry_after=min(one.retry_after for one in those),
            )
        return found

    def after(self, tried: tuple[str, ...]) -> Deployment | None:
        """Whom to ask when those in `tried` have been asked; None if there is nobody else."""
        left = [name for name in self.names if name not in tried]
        free = [name for name in left if not self.deployments[name].blocked]
        free = free or [name for name in left if self.deployments[name].last_resort]
        if self.split in free and not tried:
            return self.deployments[self.split]
        chosen = self._by_weight([name for name in free if name in self.targets])
        if chosen is None:
            chosen = next((name for name in free if name in self.way.route.fallbacks), None)
        return self.deployments[chosen] if chosen is not None else None

    def _by_weight(self, names: list[str]) -> str | None:
        # A deployment that has just said that it is full is asked all the same before the request is turned away.
        names = [name for name in names if self.deployments[name].eager] or names
        if not names:
            return None
        found = [Candidate(name, self.targets[name], self.deployments[name].load) for name in names]
        return self.way.balance.pick(found, self.asked.conversation)

    def end(self, deployment: Deployment, life: int, outcome: Outcome, retry_after: float | None) -> None:
        """Blame `deployment`, and nobody else, for `outcome`."""
        deployment.end(life, outcome, retry_after)
        if self.splitter is not None:
            self.splitter.observe(deployment.name, outcome, self.asked.key)
        if outcome.failed:
            others = [self.deployments[name] for name in self.targets if name != deployment.name]
            deployment.breaker.eject([one.breaker for one in others if one.eager and not one.blocked])
