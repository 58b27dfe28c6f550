"""The waiting sequences, in the order of an `Order`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from math import inf

from ropeway.contract import Urgency
from ropeway.scheduler.order import FIRST, Lane, Order
from ropeway.scheduler.sequence import Sequence, State

_Key = tuple[int, float, float, int]  # urgency, rank, score, number
_Entry = tuple[_Key, Sequence]
_Spot = tuple[Lane, _Key, float]  # the key's lane, and until when it holds


class WaitingRoom:
    """One sorted list for each lane of the order, merged when somebody may board.

    Adding and taking are O(log n) and a move of pointers. Nothing is ever sorted again: who has to be placed anew lies
    in a heap by the moment. A look costs a score for each lane, or for the order's window. `cached` tells how many
    tokens of a sequence the prefix cache holds.
    """

    def __init__(self, order: Order, cached: Callable[[Sequence], int]) -> None:
        self.order = order
        self._cached = cached
        self._lanes: dict[Lane, list[_Entry]] = {}
        self._at: dict[int, tuple[Sequence, _Spot]] = {}  # by number
        self._moves: list[tuple[float, int]] = []  # when somebody has to be placed anew, and the number
        self._urgent = 0  # the most urgent class that anybody has asked for
        self.count = [0] * len(Urgency)  # how many wait, by urgency

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order that matters."""
        return (seq for seq, _ in self._at.values())

    def add(self, seq: Sequence, now: float) -> None:
        """Let `seq` wait. The order may refuse one that has never run by raising."""
        self._urgent = min(self._urgent, seq.request.priority)
        spot = lane, key, _ = self._place(seq, now)
        if not seq.preemptions:
            ahead = bisect_left(self._lanes.get(lane, []), (key,))
            self.order.arrives(seq, self._look_up(seq), ahead, self._lanes.keys())
        self._put(seq, spot)

    def remove(self, seq: Sequence) -> None:
        _, (lane, key, _) = self._at.pop(seq.number)
        entries = self._lanes[lane]
        self.count[key[0]] -= 1
        del entries[bisect_left(entries, (key,))]
        if not entries:
            del self._lanes[lane]
        if len(self._moves) > 2 * len(self._at) + 64:  # most are about those who wait no more
            self._moves = sorted((until, number) for number, (_, (_, _, until)) in self._at.items() if until < inf)

    def line(self, now: float, most: int = 1024) -> Iterator[Sequence]:
        """The sequences, next first, at most `most` of a lane. They may board or leave while one walks along."""
        self._move(now)
        window = max(1, self.order.window // max(1, len(self._lanes)))
        passed = dict.fromkeys(self._lanes, 0)
        heap = []
        for lane, entries in self._lanes.items():
            rest = iter(entries[:most])
            heap += [(self._live(entry, 0, now), entry, lane, rest) for entry in islice(rest, window)]
        heapify(heap)
        while heap:
            key, entry, lane, rest = heap[0]
            fresh = self._live(entry, passed[lane], now)
            if fresh > key:  # its lane has been served meanwhile, or stands before it in this listing
                heapreplace(heap, (fresh, entry, lane, rest))
                continue
            heappop(heap)
            yield entry[1]
            if entry[1].state is State.QUEUED:
                passed[lane] += len(entry[1].tokens)
            for other in islice(rest, 1):
                heappush(heap, (self._live(other, passed[lane], now), other, lane, rest))

    def explain(self, seq: Sequence, now: float) -> str:
        """Why `seq` stands where it stands, for people."""
        reason = self.order.explain(seq, now)
        if seq.urgency:
            left = seq.arrival + self.order.rules.patience[seq.urgency] - now
            reason = f"it is background work, which boards after interactive requests for {left:.0f} s yet; {reason}"
        if not self.order.classes:
            return reason
        return (
            f"its priority is {seq.request.priority}, after waiting {now - seq.arrival:.1f} s it counts as "
            f"{self._class(seq, now)}; lower numbers board first, and among equals {reason}"
        )

    def age(self, seq: Sequence, now: float) -> float:
        """Count `seq` as interactive if it has waited for long enough. Until when it does not is returned."""
        due = seq.arrival + self.order.rules.patience[seq.urgency]
        seq.urgency *= now < due
        return due if seq.urgency else inf

    def _class(self, seq: Sequence, now: float) -> int:
        """Each `promote_after` seconds lower a priority number by one, down to the lowest that was asked for."""
        return max(self._urgent, seq.request.priority - int((now - seq.arrival) / self.order.rules.promote_after))

    def _place(self, seq: Sequence, now: float) -> _Spot:
        score, until, rank, lane = self.order.place(seq, self._look_up(seq), now)
        until = min(until, self.age(seq, now))
        if seq.preemptions:  # it was chosen before, and most of its work may still be cached
            rank, score = 0, FIRST
        if self.order.classes:
            rank += self._class(seq, now)
            after = self.order.rules.promote_after
            until = min(until, seq.arrival + (int((now - seq.arrival) / after) + 1) * after)
        return lane, (seq.urgency, rank, score, seq.number), until

    def _put(self, seq: Sequence, spot: _Spot) -> None:
        lane, key, until = spot
        self._at[seq.number] = seq, spot
        self.count[key[0]] += 1
        insort(self._lanes.setdefault(lane, []), (key, seq))
        if until < inf:
            heappush(self._moves, (until, seq.number))

    def _move(self, now: float) -> None:
        """Place anew whose time has come."""
        due = []
        while self._moves and self._moves[0][0] <= now:
            until, number = heappop(self._moves)
            if number in self._at and self._at[number][1][2] == until:
                due.append(self._at[number][0])
        for seq in due:
            self.remove(seq)
            self._put(seq, self._place(seq, now))

    def _live(self, entry: _Entry, ahead: int, now: float) -> tuple[object, ...]:
        (urgency, rank, score, number), seq = entry
        if not self.order.window or score == FIRST:
            return entry[0]
        return (urgency, rank, score, self.order.live(seq, self._look_up(seq), ahead, now), number)

    def _look_up(self, seq: Sequence) -> int:
        return self._cached(seq) if self.order.uses_cache else 0
