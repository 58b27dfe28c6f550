"""Who boards next: the waiting sequence with the smallest key."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Protocol

from ropeway.scheduler.sequence import Sequence, State

Key = tuple[float, ...]


class Order(Protocol):
    """One key for each sequence; ties are broken by order of arrival. `moves` tells that keys change with time."""

    name: str
    moves: bool

    def key(self, seq: Sequence, now: float) -> Key: ...

    def explain(self, seq: Sequence, now: float) -> str:
        """Why `seq` stands where it stands, for people."""


class Fcfs:
    """First come, first served."""

    name = "fcfs"
    moves = False

    def key(self, seq: Sequence, now: float) -> Key:
        return (seq.number,)

    def explain(self, seq: Sequence, now: float) -> str:
        return "requests board in order of arrival"


class PriorityAging:
    """Lower priority numbers first; every `promote_after` seconds of waiting lift a request by one class.

    A request of class k therefore waits behind newcomers of class 0 for at most k * promote_after seconds.
    """

    name = "priority"
    moves = True

    def __init__(self, promote_after: float) -> None:
        self._promote_after = promote_after

    def key(self, seq: Sequence, now: float) -> Key:
        return (self._rank(seq, now), seq.number)

    def _rank(self, seq: Sequence, now: float) -> int:
        return seq.request.priority - int((now - seq.arrival) / self._promote_after)

    def explain(self, seq: Sequence, now: float) -> str:
        return (
            f"its priority is {seq.request.priority}, after waiting {now - seq.arrival:.1f} s it counts as "
            f"{self._rank(seq, now)}; lower numbers board first"
        )


ORDERS: dict[str, Callable[[float], Order]] = {
    "fcfs": lambda promote_after: Fcfs(),
    "priority": PriorityAging,
}
"""How to make an order by name, from the seconds after which waiting promotes."""


class WaitingRoom:
    """The waiting sequences, in the order of an `Order`.

    Keys that never move are kept sorted by insertion; keys that move are sorted again when somebody looks, which is
    cheap because the list is nearly sorted from the last time.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._line: list[tuple[Key, Sequence]] = []

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq in self._line)

    def add(self, seq: Sequence, now: float) -> None:
        insort(self._line, (self.order.key(seq, now), seq), key=lambda entry: entry[0])

    def remove(self, seq: Sequence) -> None:
        self._line = [entry for entry in self._line if entry[1] is not seq]

    def leave(self, looked: int) -> None:
        """Some of the first `looked` in line have boarded."""
        self._line[:looked] = [entry for entry in self._line[:looked] if entry[1].state is State.QUEUED]

    def line(self, now: float) -> list[Sequence]:
        """All of them, next first."""
        if self.order.moves:
            self._line = sorted(((self.order.key(seq, now), seq) for _, seq in self._line), key=lambda entry: entry[0])
        return [seq for _, seq in self._line]
