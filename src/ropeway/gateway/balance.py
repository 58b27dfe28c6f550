"""Which of several deployments that could do a request's work gets it. Pure: no clock, no I/O, no randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ropeway.experiment.split import distance

Policy = Literal["least_load", "weighted", "affinity"]
SLACK: Final = 1.25
"""Load above the fair share, as a factor, that a deployment may reach before affinity gives way."""


@dataclass(frozen=True)
class Candidate:
    """A deployment with its share of the route's weights, and the requests that it is answering."""

    name: str
    weight: float
    load: int


class Rotation:
    """Takes turns so that each name gets exactly its share, spread evenly.

    Source: nginx's smooth weighted round robin.
    """

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def pick(self, found: Sequence[Candidate]) -> str:
        for one in found:
            self._credit[one.name] = self._credit.get(one.name, 0.0) + one.weight
        chosen = max(found, key=lambda one: self._credit[one.name])
        self._credit[chosen.name] -= sum(one.weight for one in found)
        return chosen.name


class Balance:
    """Chooses by a policy; the memory of one route.

    `least_load`: the fewest requests for the weight; equals take turns. `weighted`: turns alone, whatever the load.
    `affinity`: requests with the same key stay together, where their prefix is cached, unless that one has more than
    `SLACK` times its share of the load.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._turns = Rotation()

    def pick(self, found: Sequence[Candidate], key: str) -> str:
        """One of `found`, which is not empty and has no weights of 0."""
        if self._policy == "affinity":
            return nearest(found, key)
        if self._policy == "least_load":
            least = min((one.load + 1) / one.weight for one in found)
            # A request more or less is no difference between a load of 1 / 0.3 and one of 3 / 0.9.
            found = [one for one in found if (one.load + 1) / one.weight <= least * (1 + 1e-9)]
        return self._turns.pick(found)


def nearest(found: Sequence[Candidate], key: str) -> str:
    """The deployment that `key` belongs to, or if it has too much to do, the next nearest that has not.

    A deployment that comes or goes moves only its own keys. Sources: Thaler and Ravishankar, "A name-based mapping
    scheme for rendezvous", 1996; Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018.
    """
    total, weights = sum(one.load for one in found) + 1, sum(one.weight for one in found)
    for one in sorted(found, key=lambda one: distance(one.name, key, one.weight)):
        if one.load + 1 <= math.ceil(SLACK * total * one.weight / weights):
            return one.name
    raise AssertionError("not all can be above their share")
