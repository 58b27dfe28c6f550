"""Who boards next: the waiting sequence with the smallest key `(rank, score, live score, arrival)`.

An order scores sequences; the `WaitingRoom` makes keys of that and keeps them. Rank and score hold until the moment
that the order names; a live score is asked for whenever somebody may board, of few.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ropeway.errors import ConfigError, DeadlineError, OverloadedError
from ropeway.scheduler.sequence import Sequence

Lane = str | int
FIRST = -inf
"""The score of whoever boards before all scores of its rank, in order of arrival."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What orders can be told."""

    promote_after: float = 30.0  # seconds of waiting that lower a priority number by one
    age_cap: float = 10.0  # seconds of waiting after which no score counts any more
    quantum: float = 2000.0  # virtual tokens by which tenants may differ for the sake of cached prefixes
    weights: Mapping[str, float] = field(default_factory=dict)  # tenants' shares; 1 for those not named
    patience: tuple[float, ...] = (0.0, 120.0, 3600.0)  # seconds after which requests count as interactive, by urgency


class Place(NamedTuple):
    """Where a sequence waits, until it has to be placed anew. In a lane nobody overtakes by a live score, but for
    those in the order's window."""

    score: float = 0.0
    until: float = inf
    rank: int = 0
    lane: Lane = ""


class Order:
    """First come, first served: what every other order changes in some respect."""

    name = "fcfs"
    uses_cache = False  # else what is cached of a sequence is not looked up, but 0
    window = 0  # how many of the first in line get a live score
    held = 16  # how many that lack room for themselves a step looks past, at most
    reason = "requests board in order of arrival"

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.classes = False  # whether the requests' own priorities stand before everything else

    def work(self, seq: Sequence, cached: int) -> int:
        """Tokens to compute until its next one; who can estimate the length of an answer would add it here."""
        return max(1, len(seq.tokens) - cached)

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        """The part of its key that stays. `cached` of its tokens are in the prefix cache."""
        return Place()

    def live(self, seq: Sequence, cached: int, ahead: int, now: float) -> tuple[float, ...]:
        """A score of now. `ahead` tokens of its lane stand before it in this listing."""
        return ()

    def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
        """`seq` comes and stands behind `ahead` others of its lane. Somebody waits in `lanes`. May refuse it."""

    def boards(self, seq: Sequence, now: float) -> None:
        """`seq` has boarded; its first `computed` tokens were cached."""

    def leaves(self, seq: Sequence) -> None:
        """`seq` has ended, or is put back."""

    def explain(self, seq: Sequence, now: float) -> str:
        """Why `seq` stands where it stands, for people."""
        return self.reason.format(wait=now - seq.arrival, cap=self.rules.age_cap)

    def _capped(self, seq: Sequence, score: float, now: float) -> Place:
        """`score` until `age_cap`, then before all scores: nobody waits longer than that and the others of that age.
        What is cached of a request is looked up again whenever its wait has tripled."""
        aged = seq.arrival + self.rules.age_cap
        return Place(FIRST) if now >= aged else Place(score, min(aged, _tripled(seq, now)))


class ShortestFirst(Order):
    """Fewest tokens to compute first, with a cap on age: what is known of the shortest job first."""

    name = "sjf"
    uses_cache = True
    reason = "fewer uncached prompt tokens board first, and after {cap:g} s whoever came first"

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        return self._capped(seq, self.work(seq, cached), now)


class PrefixFirst(Order):
    """Longest cached beginning first, among the first 128 in order of arrival, with a cap on age.

    Source: longest prefix match in SGLang (Zheng et al., arXiv:2312.07104).
    """

    name = "prefix"
    uses_cache = True
    window = 128
    reason = "of 128 requests the longest cached beginning boards first, and after {cap:g} s whoever came first"

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        return self._capped(seq, 0.0, now)

    def live(self, seq: Sequence, cached: int, ahead: int, now: float) -> tuple[float, ...]:
        return (-cached,)


class ResponseRatio(Order):
    """Highest response ratio next (Brinch Hansen 1971): (waiting time + work) / work. The short go first, and nobody
    is forgotten. A lane holds works within a quarter of each other, where the oldest stands for all."""

    name = "hrrn"
    uses_cache = True
    window = 1
    reason = "it has waited {wait:.1f} s; the longest wait for each uncached prompt token boards first"

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        work = self.work(seq, cached)
        digits = max(0, work.bit_length() - 3)
        return Place(until=_tripled(seq, now), lane=work >> digits << digits)

    def live(self, seq: Sequence, cached: int, ahead: int, now: float) -> tuple[float, ...]:
        return ((seq.arrival - now) / self.work(seq, cached),)


class Deadline(Order):
    """Least slack first: the latest moment at which computing must begin for the first token to be in time.

    Refuses at the door, with the numbers, who would be late. Who is late all the same steps back by `LATE` classes and
    rises by one every `promote_after` seconds. A request without a deadline stands as if it had `promote_after`
    seconds, and is neither refused nor set back. Source: relegation in Niyama (arXiv:2503.22562).
    """

    name = "deadline"
    uses_cache = True
    LATE = 10
    SURE = 0.8  # of the time until the deadline; the rest is for what cannot be foreseen

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self._boarded = -inf
        self._pace = Mean()  # seconds between boardings while somebody waited
        self._prefill = Mean()  # seconds for a prompt token
        self._fastest = inf  # the same at the best

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        wanted, patience = seq.request.ttft_deadline_s, self.rules.promote_after
        due = seq.arrival + (patience if wanted is None else wanted)
        if wanted is not None and now >= due:
            steps = int((now - due) / patience)
            return Place(until=due + (steps + 1) * patience, rank=max(0, self.LATE - steps))
        until = inf if wanted is None else min(due, _tripled(seq, now))
        return Place(due - self.work(seq, cached) * self._prefill.value, until)

    def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
        wanted, tokens = seq.request.ttft_deadline_s, self.work(seq, cached)
        if wanted is None:
            return
        if self._fastest < inf and tokens * self._fastest > wanted:
            raise DeadlineError(
                f"The first token is wanted within {wanted:.3g} s, but {tokens} prompt tokens are not cached and take "
                f"at least {tokens * self._fastest:.3g} s here. Shorten the prompt or allow more time."
            )
        after = ahead * self._pace.value + tokens * self._prefill.value
        if ahead and after > self.SURE * wanted:
            raise OverloadedError(
                f"The first token is wanted within {wanted:.3g} s, a fifth of which has to be spare, and is expected "
                f"after {after:.3g} s: {ahead} requests board before, one every {self._pace.value:.3g} s. Allow more "
                "time, or retry later.",
                retry_after=max(1.0, after - self.SURE * wanted),
            )

    def boards(self, seq: Sequence, now: float) -> None:
        # Since then somebody was waiting, so this tells how fast a queue moves, and nothing while there is none.
        if not seq.urgency:  # who has waited for want of idle seats tells nothing
            self._pace.learn(now - max(self._boarded, seq.arrival))
            self._boarded = now

    def leaves(self, seq: Sequence) -> None:
        tokens = seq.prompt_len - seq.cached
        if seq.first_token is not None and seq.first_scheduled is not None and not (seq.preemptions or seq.urgency):
            took = seq.first_token - seq.first_scheduled
            self._prefill.learn(took, tokens)
            self._fastest = min(self._fastest, took / tokens)

    def explain(self, seq: Sequence, now: float) -> str:
        wanted = seq.request.ttft_deadline_s
        if wanted is None:
            return f"it names no deadline and stands as if it had {self.rules.promote_after:g} s"
        left = seq.arrival + wanted - now
        if left > 0:
            return f"its first token is due in {left:.2f} s; less slack boards first"
        return f"its first token is {abs(left):.2f} s late; who can still be in time boards first"


class FairShare(Order):
    """Tenants get equal service, or shares by weight: who has had least boards next, and of those within one quantum
    the longest cached beginning.

    Service is counted in virtual tokens, `INPUT` for an uncached prompt token and `OUTPUT` for a generated one, over
    the tenant's weight. Who has nothing waiting saves up no credit. While two tenants have requests waiting, what they
    get differs by at most 2 * max(INPUT * longest prompt, OUTPUT * tokens in the pool) + quantum.
    Sources: VTC (Sheng et al., arXiv:2401.00588), and for the quantum DLPM (Cao et al., arXiv:2501.14312).
    """

    name = "fair"
    uses_cache = True
    window = 128
    held = 0  # small requests of one tenant could else keep a large one of another from ever being served its share
    INPUT, OUTPUT = 1.0, 2.0

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self._service: dict[str, float] = {}
        self._last = 0.0  # the service of the tenant that boarded last, then
        self._riding: dict[int, tuple[Sequence, int]] = {}  # with the tokens of its answer that are accounted for

    def service(self, tenant: str) -> float:
        """Virtual tokens over weight, including all that has been generated. Steps cost nothing: it is counted here."""
        for number, (seq, counted) in self._riding.items():
            if seq.output_len > counted:
                self._charge(seq.request.tenant, self.OUTPUT * (seq.output_len - counted))
                self._riding[number] = seq, seq.output_len
        return self._service.get(tenant, 0.0)

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        return Place(lane=seq.request.tenant)

    def live(self, seq: Sequence, cached: int, ahead: int, now: float) -> tuple[float, ...]:
        tenant, quantum = seq.request.tenant, self.rules.quantum
        service = self._service.get(tenant, 0.0) + self.INPUT * ahead / self.rules.weights.get(tenant, 1.0)
        return (service // quantum if quantum else service, -cached, service)

    def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
        tenant = seq.request.tenant
        own = self.service(tenant)
        if not lanes and not self._riding:
            self._service.clear()  # where nobody is, nobody is owed anything
        elif tenant not in lanes:
            least = min((self._service.get(str(lane), 0.0) for lane in lanes), default=self._last)
            if len(self._service) > 1000 + 2 * len(lanes):  # who would be lifted anyway can be forgotten
                here = {*lanes, *(rider.request.tenant for rider, _ in self._riding.values())}
                self._service = {t: s for t, s in self._service.items() if s > least or t in here}
            self._service[tenant] = max(own, least)

    def boards(self, seq: Sequence, now: float) -> None:
        self._last = self.service(seq.request.tenant)
        if not seq.preemptions:  # else it was charged the first time
            self._charge(seq.request.tenant, self.INPUT * (len(seq.tokens) - seq.computed))
        self._riding[seq.number] = seq, seq.output_len

    def leaves(self, seq: Sequence) -> None:
        self.service(seq.request.tenant)
        self._riding.pop(seq.number, None)

    def explain(self, seq: Sequence, now: float) -> str:
        tenant = seq.request.tenant
        return f"tenant {tenant!r} has had {self.service(tenant):.0f} virtual tokens; who has had less boards first"

    def _charge(self, tenant: str, tokens: float) -> None:
        self._service[tenant] = self._service.get(tenant, 0.0) + tokens / self.rules.weights.get(tenant, 1.0)


ORDERS = {order.name: order for order in (Order, ShortestFirst, ResponseRatio, PrefixFirst, Deadline, FairShare)}


def make_order(policy: str, rules: Rules | None = None) -> Order:
    """The order that `policy` names: one of `ORDERS`, or `priority:NAME` with the requests' priorities outside and
    that order among equals (`priority` alone: fcfs). Raises ConfigError."""
    outside, _, inside = ("priority:fcfs" if policy == "priority" else policy).rpartition(":")
    if inside not in ORDERS or outside not in ("", "priority"):
        known = ", ".join(ORDERS)
        raise ConfigError(
            f"There is no scheduling policy {policy!r}. Take {known}, or priority:NAME with one of these inside.",
            param="scheduling_policy",
        )
    order = ORDERS[inside](rules or Rules())
    order.name, order.classes = policy, outside == "priority"
    return order


class Mean:
    """A mean in which old samples fade: with a `keep` of 0.97 some thirty count. 0 before the first."""

    def __init__(self, keep: float = 0.97) -> None:
        self._keep = keep
        self._sum = self._count = self.value = 0.0

    def learn(self, amount: float, count: int = 1) -> None:
        self._sum, self._count = self._sum * self._keep + amount, self._count * self._keep + count
        self.value = self._sum / self._count


def _tripled(seq: Sequence, now: float) -> float:
    """When `seq` will have waited three times as long, but at least a second longer."""
    return now + max(2 * (now - seq.arrival), 1.0)
