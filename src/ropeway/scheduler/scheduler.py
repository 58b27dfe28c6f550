"""The scheduler: which tokens of which requests does the next step compute?

There is no prefill phase and no decode phase. A sequence has known tokens and computed tokens, and every step lets the
second catch up with the first as far as the limits allow. A row that reaches the end of what is known yields a token.
Continuous batching, chunked prefill, prefix reuse and resuming after preemption are all this one rule.

Background work (requests of urgency MEDIUM and LOW) takes what is left: a step is planned for the interactive
requests as if there were no others, and then for the others within what that leaves of seats, blocks, and tokens.

The scheduler is a pure state machine: no clock, no I/O, no randomness, ordered containers only. The same calls give
the same plans, so any run can be replayed, and simulation runs this very code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice

from ropeway.contract import Admit, ErrorInfo, FinishReason, GenerateRequest, Row, StepPlan, StepResult, Urgency
from ropeway.contract.event import Pinned, TokenEvent, Why
from ropeway.errors import RequestError
from ropeway.kv import KeyChain, Memory
from ropeway.scheduler.budget import Backfill, Budget
from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.limits import ANYBODY, Limit, Limits
from ropeway.scheduler.order import Order
from ropeway.scheduler.outlook import Outlook
from ropeway.scheduler.resources import Counters, Resources, check_fits
from ropeway.scheduler.sequence import Sequence, State
from ropeway.scheduler.stops import final_event, finish_after
from ropeway.scheduler.victim import Victim
from ropeway.scheduler.waiting import WaitingRoom

_LOOK = 1024  # waiting sequences that a step looks at, at most: those held back by what others compute are passed over
_NONE: list[int] = []  # the new blocks of a row that needs none: one list for all, which nobody may change


@dataclass
class _Draft:
    """A plan in the making. Its first `interactive` rows are those of interactive requests; `calm` is the urgency of
    the most urgent that was put back, above all if nobody was."""

    rows: list[Row] = field(default_factory=list)
    admit: list[Admit] = field(default_factory=list)
    interactive: int = 0
    calm: int = len(Urgency)


class Scheduler:
    """Owns every KV block and every slot of one executor. See the module for the rule, `plan` for a step."""

    def __init__(
        self, resources: Resources, order: Order, victim: Victim, budget: Budget, forecast: Forecast | None = None
    ) -> None:
        self.resources = resources
        self.memory = Memory(
            resources.num_blocks, resources.block_size, resources.tiers, remember=resources.prefix_caching,
            quota=resources.tenant_quota, mode=resources.preemption_mode,
        )  # fmt: skip
        self.pool = self.memory.pool
        self.counters = Counters()
        self.running: list[Sequence] = []  # in order of admission
        self.waiting = WaitingRoom(order, self._cached)
        self.sequences: dict[int, Sequence] = {}  # all of them, by rid
        self._keys = KeyChain(resources.block_size, resources.secret)
        self._victim = victim
        self.budget = budget
        self._backfill = Backfill(resources.background_gap)
        self._forecast = forecast or Forecast()
        self._outlook = Outlook(resources, self._forecast, self._cached)
        self._limits = Limits(resources, self.pool, self._forecast)
        self._release: list[int] = []
        self._last = _Draft()
        self._interactive: deque[int] = deque()  # those of the steps under way
        self._step = self._arrivals = 0

    # Requests come and go

    def add(self, request: GenerateRequest, now: float) -> None:
        """Let a request wait. Raises RequestError, with the numbers, if it could never run."""
        check_fits(request, self.resources, self.memory.pins.reserved)
        if request.rid in self.sequences:
            raise RequestError(f"Request id {request.rid} is in use.")
        self._arrivals += 1
        seq = Sequence(request, self._arrivals, now, self.resources.max_model_len, self.resources.prefix_caching)
        self.waiting.add(seq, now)
        self.sequences[seq.rid] = seq

    def cancel(self, rid: int, reason: FinishReason, now: float, error: ErrorInfo | None = None) -> TokenEvent | None:
        """End a request from outside: its final event, or None if it has ended already."""
        seq = self.sequences.get(rid)
        return None if seq is None else self._finish(seq, reason, now, error)

    def reorder(self, order: Order, now: float) -> None:
        """Let those who wait board by another order from now on. It hears of everybody as if they came anew."""
        room = WaitingRoom(order, self._cached)
        for seq in sorted(self.waiting, key=lambda seq: seq.number):
            room.add(seq, now)
        for seq in self.running:
            order.boards(seq, seq.first_scheduled or now)
        self.waiting = room

    def why(self, now: float, rids: Collection[int] = (), most: int | None = None) -> list[Why]:
        """What each of `rids` (if empty: of the first `most` in line, or all) waits for. Unknown ids are left out."""
        line = list(islice(self.waiting.line(now, len(self.waiting)), most and max(most, self.resources.slots)))
        self._limits.begin(self.running, lambda: line)
        place = {seq.rid: position for position, seq in enumerate(line)}
        wanted = [self.sequences[rid] for rid in rids if rid in self.sequences] if rids else line[:most]
        waits = self._foretell(line[: 1 + max([place.get(seq.rid, -1) for seq in wanted], default=-1)], now)
        return [self._explain(seq, place.get(seq.rid, -1), waits, now) for seq in wanted]

    def pin(self, name: str, tokens: list[int], salt: str) -> list[Pinned]:
        """Keep the full blocks of a prefix cached as `name`; give it up if there are no `tokens`. Returns what is
        pinned. Raises RequestError, with the numbers, if it would take too much."""
        size, pins = self.resources.block_size, self.memory.pins
        if tokens:
            keys: list[bytes] = []
            self._keys.extend(keys, tokens, salt, len(tokens))
            largest = max((-(-seq.end // size) for seq in self.sequences.values()), default=0)
            pins.add(name, keys, self.resources.num_blocks - largest)
        elif name and not pins.remove(name):
            raise RequestError(f"No prefix is pinned as {name[:64]!r}.", param="name")
        return pins.listing(size)

    @property
    def busy(self) -> bool:
        """Whether there is something to do; copies to a tier that lasts do not wait for somebody to come."""
        return bool(self.sequences) or bool(self.memory.copies)

    # A step

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute."""
        draft = _Draft()
        for urgency, riders in self._classes(now):
            self._fill(urgency, riders, draft)
            self._continue_running(riders, draft, now)
            # Who was just put back must not board again at once: the blocks it gave are meant for others, and who is
            # on board may want more of them in the next step.
            if urgency < self._last.calm or not self.running:
                self._board(urgency, draft, now)
            if urgency == Urgency.HIGH:
                draft.interactive = len(draft.rows)
        self._last = draft
        if not draft.rows:
            self._outlook.idle()
        if not draft.rows and not self.memory.copies:
            return None
        self._step += 1
        if self.waiting and self._step % Outlook.EVERY == 0:
            self._foretell(list(islice(self.waiting.line(now), Outlook.SAMPLE)), now)  # to see how good it is
        release, self._release = self._release, []
        self._interactive.append(draft.interactive)
        return StepPlan(self._step, release, draft.admit, draft.rows, self.memory.take_copies())

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Take in what a step has computed. Returns news in the plan's order of rows."""
        faults = {plan.rows[fault.row].rid: fault for fault in result.faults}
        events: list[TokenEvent] = []
        sequences, generated = self.sequences, 0
        for key in result.lost:
            self._lose(key, now)
        for row, tokens in zip(plan.rows, result.tokens, strict=True):
            seq = sequences.get(row.rid)
            if seq is None or seq.epoch != row.epoch:
                continue  # cancelled or preempted while the step was under way
            if faults and row.rid in faults:
                # What made it fail may already be in its earlier blocks: nobody may build on them.
                self.memory.forget(seq.keys[: seq.published])
                seq.due = 0
                error = ErrorInfo(faults[row.rid].code, faults[row.rid].message, faults[row.rid].param)
                events.append(self._finish(seq, FinishReason.FAILED, now, error))
                continue
            computed = row.start + row.count
            if computed < seq.due and row.emit and len(tokens) == 1 and tokens[0] not in seq.ends:
                seq.tokens.append(tokens[0])
                generated += 1
                events.append(TokenEvent(row.rid, tokens, False, seq.cached))
                continue
            self._publish(seq, computed)
            if row.emit:
                if seq.first_token is None:
                    seq.first_token = now
                    self._backfill.began(seq)
                seq.tokens += tokens
                events.append(self._end(seq, tokens, now))
                generated += len(events[-1].tokens)
        self.counters.generation_tokens += generated
        seconds, interactive = result.seconds - sum(result.copy_seconds), self._interactive.popleft()
        if plan.rows:
            self.budget.learn(plan, seconds)
            self._backfill.took(plan, seconds, interactive)
        self.memory.learn(plan, result)
        self._outlook.stepped(now)
        return events

    # How a step is planned

    def _classes(self, now: float) -> list[tuple[int, list[Sequence]]]:
        """Who runs, by urgency, as far as there is anybody."""
        background, riders = [seq for seq in self.running if seq.urgency], [[*self.running], [], []]
        for seq in background:
            self.waiting.age(seq, now)
        if background:
            riders = [[seq for seq in self.running if seq.urgency == one] for one in Urgency]
        return [(urgency, them) for urgency, them in enumerate(riders) if them or self.waiting.count[urgency]]

    def _fill(self, urgency: int, riders: list[Sequence], draft: _Draft) -> None:
        """Let `riders`, and who boards with their `urgency`, have what the `draft` has left of a step's tokens."""
        used = sum([row.count for row in draft.rows])
        most = self.budget.tokens(self.running if urgency else riders)
        if urgency:
            most = min(most, used + self._backfill.tokens(draft.rows, draft.interactive > 0, riders))
        self._limits.tokens.fill(most, used)

    def _continue_running(self, riders: list[Sequence], draft: _Draft, now: float) -> None:
        tokens, left = self._limits.tokens, self._limits.tokens.left
        for seq in riders:
            start, known = seq.computed, seq.known
            if known <= seq.room and known - start <= left:
                # It holds all that it needs but tokens of the step: no other limit has a say.
                draft.rows.append(Row(seq.rid, seq.epoch, seq.slot, start, known - start, True, _NONE))
                seq.computed, seq.known = known, known + 1
                left -= known - start
            elif seq.state is State.RUNNING:  # and not put back for the sake of an earlier one
                tokens.left = left
                count, _ = self._cap(seq, draft, now)
                if count > 0:
                    self._run(seq, count, draft)
                left = tokens.left
        tokens.left = left

    def _cap(self, seq: Sequence, draft: _Draft, now: float) -> tuple[int, Limit | None]:
        """How many tokens `seq` may run, if need be in the place of others, and the limit that held it to that."""
        count, holder = self._limits.cap(seq)
        while count <= 0 and holder in self._limits.places and self._put_back(seq, draft, now) not in (None, seq):
            count, holder = self._limits.cap(seq)
        return count, holder

    def _put_back(self, seq: Sequence, draft: _Draft, now: float) -> Sequence | None:
        """Preempt one of the least urgent on board for `seq`, and tell whom; None if there is nobody. Among equals this
        is for those on board alone, perhaps `seq` itself, and the oldest never gives way: there is always progress."""
        least = max([other.urgency for other in self.running], default=0)
        candidates = [other for other in self.running if other.urgency == least]
        if least <= seq.urgency:
            candidates = candidates[1:] if seq.state is State.RUNNING else []
        if not candidates:
            return None
        victim = self._victim.pick(candidates, self._forecast)
        row = next((row for row in draft.rows if row.rid == victim.rid), None)
        if row is not None:
            draft.rows.remove(row)
            self._limits.tokens.left += row.count
        self._requeue(victim, now)
        if victim.urgency == seq.urgency:  # else it is no error in what was expected
            self._forecast.preempted()
        draft.calm = min(draft.calm, victim.urgency)
        return victim

    def _requeue(self, seq: Sequence, now: float) -> None:
        self._vacate(seq)
        seq.move(State.QUEUED)
        seq.epoch += 1
        seq.preemptions += 1
        seq.known = len(seq.tokens)
        seq.computed = seq.published = 0
        self.counters.preemptions += 1
        self.waiting.add(seq, now)

    def _lose(self, key: bytes, now: float) -> None:
        """Content that was brought back is damaged: whoever holds it starts again without."""
        block = self.pool.find(key)
        for seq in [seq for seq in self.running if block in seq.blocks]:
            self._requeue(seq, now)
        self.memory.forget([key])

    def _board(self, urgency: int, draft: _Draft, now: float) -> None:
        """Let those board that have `urgency` or more; nobody before one that is more urgent, or was just put back."""
        places = self._limits.slots.free or any(seq.urgency > urgency for seq in self.running)
        if not any(self.waiting.count[: urgency + 1]) or not places or self._limits.tokens.left <= 0:
            return
        self._limits.begin(self.running, lambda: list(self.waiting.line(now)))
        held: list[Sequence] = []
        for seq in islice(self.waiting.line(now), _LOOK):
            if seq.urgency > min(held[0].urgency if held else urgency, draft.calm - 1):
                break
            self._match(seq)
            count, holder = self._cap(seq, draft, now)
            if count > 0:
                self._admit(seq, draft, now)
                self._run(seq, count, draft)
                for other in held:
                    other.passed += 1
                continue
            seq.blocks, seq.computed = [], 0
            if holder is None:
                break
            if holder.passes < ANYBODY:
                if seq.passed >= holder.passes or len(held) >= self.waiting.order.held:
                    break
                held.append(seq)

    def _match(self, seq: Sequence) -> None:
        """Look up the cached beginning of a waiting sequence. At least one token stays to be computed."""
        if seq.shares:
            self._keys.extend(seq.keys, seq.tokens, seq.request.salt, len(seq.tokens))
            keys = seq.keys[: (len(seq.tokens) - 1) // self.resources.block_size]
            seq.blocks = self.pool.match(keys)
            cached = len(seq.blocks) + self.memory.beneath(keys[len(seq.blocks) :], again=seq.preemptions > 0)
            seq.computed = cached * self.resources.block_size

    def _cached(self, seq: Sequence) -> int:
        """How many tokens of a waiting sequence are cached."""
        self._match(seq)
        cached = seq.computed
        seq.blocks, seq.computed = [], 0
        return cached

    def _admit(self, seq: Sequence, draft: _Draft, now: float) -> None:
        seq.shared = len(seq.blocks) - self.pool.idle(seq.blocks)
        self.pool.share(seq.blocks)
        beneath = seq.keys[len(seq.blocks) : seq.computed // self.resources.block_size]
        seq.blocks += self.memory.bring(beneath, seq.request.tenant)
        seq.move(State.RUNNING)
        self.waiting.remove(seq)
        self.waiting.order.boards(seq, now)
        self._outlook.boards(seq, now)
        seq.passed = 0
        seq.published = len(seq.blocks)
        self.running.append(seq)
        self._limits.boards(seq)
        if seq.first_scheduled is None:
            seq.first_scheduled = now
            seq.cached = seq.computed
            self.counters.cache_queries += seq.prompt_len
            self.counters.cache_hits += seq.computed
            self.counters.prompt_tokens += seq.prompt_len
        draft.admit.append(
            Admit(
                seq.rid, seq.epoch, seq.slot, list(seq.tokens), seq.prompt_len, seq.computed, list(seq.blocks),
                seq.request.sampling, seq.request.eos_ids, seq.request.pooling, seq.request.second,
            )
        )  # fmt: skip

    def _run(self, seq: Sequence, count: int, draft: _Draft) -> None:
        size, end = self.resources.block_size, seq.computed + count
        needed = -(-end // size) - len(seq.blocks)
        blocks = self.pool.alloc(needed) if needed > 0 else _NONE
        if blocks is None:
            raise RuntimeError(f"{needed} blocks were promised to request {seq.rid} but {self.pool.available} are free")
        seq.blocks += blocks
        seq.room = min(len(seq.blocks) * size, seq.end - 1)
        emit = end == seq.known
        draft.rows.append(Row(seq.rid, seq.epoch, seq.slot, seq.computed, count, emit, blocks))
        seq.computed = end
        seq.known += emit
        self._limits.tokens.left -= count

    # How a step ends

    def _end(self, seq: Sequence, tokens: list[int], now: float) -> TokenEvent:
        """What becomes of `seq` by its last `tokens`: perhaps one of them ends it, and those behind are void."""
        if not tokens:
            error = ErrorInfo("RW-ENGINE", f"The executor returned no token for request {seq.rid}.")
            return self._finish(seq, FinishReason.FAILED, now, error)
        first = len(seq.tokens) - len(tokens)
        for number, length in enumerate(range(first + 1, len(seq.tokens) + 1), 1):
            reason = finish_after(seq, length)
            if reason is not None:
                del seq.tokens[length:]
                return self._finish(seq, reason, now, tokens=tokens[:number])
        seq.known += len(tokens) - 1  # one was expected
        return TokenEvent(seq.rid, tokens, False, seq.cached)

    def _publish(self, seq: Sequence, committed: int) -> None:
        """Offer the full blocks of the first `committed` tokens, which have come back from the device, to the prefix
        cache: never before, so that a failed step poisons nothing. What a sequence generates is offered when it leaves:
        hardly anybody can begin with an answer that has no end yet."""
        known, full = len(seq.tokens), committed // self.resources.block_size
        if seq.shares:
            self._keys.extend(seq.keys, seq.tokens, seq.request.salt, committed)
            for index in range(seq.published, full):
                self.memory.publish(seq.blocks[index], seq.keys[index], seq.request.tenant)
            self._limits.shared.settle(seq, seq.keys[seq.published : full])
            seq.published = full
        seq.due = seq.end - 1 if committed == known else 0

    def _finish(
        self, seq: Sequence, reason: FinishReason, now: float, error: ErrorInfo | None = None, tokens: list[int] = _NONE
    ) -> TokenEvent:
        if seq.state is State.RUNNING:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
            self._outlook.leaves(seq)
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and not seq.request.pooling:
            self._forecast.ended(seq)
        seq.finish = reason
        seq.move(State.FINISHED)
        del self.sequences[seq.rid]
        return final_event(seq, now, error, tokens)

    def _vacate(self, seq: Sequence) -> None:
        """Give back seat and blocks. Plans run in order, so the next plan may hand both out again even while a step
        that uses them is still under way."""
        if seq.due == seq.end - 1:  # it generates: all but its last token has come back
            self._publish(seq, len(seq.tokens) - 1)
        self.running.remove(seq)
        self.waiting.order.leaves(seq)
        self._release.append(seq.slot)
        self._limits.leaves(seq)
        self.pool.release(seq.blocks)
        seq.blocks, seq.room = [], 0

    # What people may ask

    def _foretell(self, line: list[Sequence], now: float) -> list[float]:
        tokens = max(1, self.budget.tokens(self.running) - len(self.running))
        return self._outlook.foretell(self.running, line, tokens, now)

    def _explain(self, seq: Sequence, position: int, waits: list[float], now: float) -> Why:
        if seq.state is State.RUNNING:
            return Why(seq.rid, "running", position, "", f"{seq.computed} of its {len(seq.tokens)} tokens are computed")
        self._match(seq)
        riders = [rider for rider in self.running if rider.urgency <= seq.urgency]
        if seq.urgency:
            self._fill(seq.urgency, [], self._last)  # the next step is taken to be like the last
        else:  # who rides has tokens before it
            used = sum([rider.known - rider.computed for rider in riders])
            self._limits.tokens.fill(self.budget.tokens(riders), used)
        count, holder = self._limits.cap(seq)
        name, why = "", "it boards with the next step"
        gets_it = holder in self._limits.places and len(riders) < len(self.running)  # from background work
        if holder is not None and count <= 0 and not gets_it:
            name, why = holder.name, holder.why(seq)
        seq.blocks, seq.computed = [], 0
        if position > 0 and (holder is None or holder.passes < ANYBODY):
            name = self.waiting.order.name
            why = f"{position} requests stand before it; {self.waiting.explain(seq, now)}"
        eta = waits[position] if waits else None
        return Why(seq.rid, seq.state.value, position, name, why, eta, self._outlook.error)
