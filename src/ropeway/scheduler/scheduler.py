"""The scheduler: which tokens of which requests does the next step compute?

There is no prefill phase and no decode phase. A sequence has known tokens and computed tokens, and every step lets the
second catch up with the first as far as the limits allow. A row that reaches the end of what is known yields a token.
Continuous batching, chunked prefill, prefix reuse and resuming after preemption are all this one rule.

The scheduler is a pure state machine: no clock, no I/O, no randomness, ordered containers only. The same calls give
the same plans, so any run can be replayed, and simulation runs this very code.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ropeway.contract import (
    Admit,
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    Row,
    StepPlan,
    StepResult,
    TokenEvent,
    Usage,
    Why,
)
from ropeway.errors import ContextLengthError, NeverFitsError, RequestError
from ropeway.kv import BlockPool, KeyChain
from ropeway.scheduler.budget import Budget
from ropeway.scheduler.limits import (
    BlockLimit,
    LengthLimit,
    Limit,
    SharedPrefix,
    SlotLimit,
    StaticBatch,
    TokenLimit,
    WholePrompt,
)
from ropeway.scheduler.order import Order, WaitingRoom
from ropeway.scheduler.sequence import Sequence, State
from ropeway.scheduler.stops import finish_after, stop_token
from ropeway.scheduler.victim import Victim

_LOOK = 1024
"""Waiting sequences that a step looks at, at most: those held back by what others compute are passed over."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What there is to share out, and which of the optional limits apply."""

    num_blocks: int
    block_size: int
    slots: int
    max_model_len: int
    max_step_tokens: int
    prefix_caching: bool = True
    chunked_prefill: bool = True
    static_batching: bool = False
    secret: bytes = b"ropeway"


@dataclass
class Counters:
    """Totals since the start. Cache figures count tokens of first admissions."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0


@dataclass
class _Draft:
    """A plan in the making."""

    rows: dict[int, Row] = field(default_factory=dict)
    admit: list[Admit] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Owns every KV block and every slot of one executor. See the module for the rule, `plan` for a step."""

    def __init__(self, resources: Resources, order: Order, victim: Victim, budget: Budget) -> None:
        self.resources = resources
        self.pool = BlockPool(resources.num_blocks, remember=resources.prefix_caching)
        self.counters = Counters()
        self.running: list[Sequence] = []  # in order of admission
        self.waiting = WaitingRoom(order)
        self._sequences: dict[int, Sequence] = {}
        self._keys = KeyChain(resources.block_size, resources.secret)
        self._victim = victim
        self._budget = budget
        self._tokens = TokenLimit()
        self._slots = SlotLimit(resources.slots)
        self._shared = SharedPrefix(resources.block_size)
        self._blocks = BlockLimit(self.pool, resources.block_size)
        self._limits: list[Limit] = [
            *([StaticBatch(resources.slots)] if resources.static_batching else []),
            LengthLimit(resources.max_model_len),
            self._slots,
            self._shared,
            self._tokens,
            *([] if resources.chunked_prefill else [WholePrompt(self._tokens)]),
            self._blocks,
        ]
        self._release: list[int] = []
        self._step = 0
        self._arrivals = 0

    # Requests come and go

    def add(self, request: GenerateRequest, now: float) -> None:
        """Let a request wait. Raises RequestError, with the numbers, if it could never run."""
        self._check_fits(request)
        if request.rid in self._sequences:
            raise RequestError(f"Request id {request.rid} is in use.")
        self._arrivals += 1
        seq = Sequence(request, self._arrivals, now)
        self._sequences[seq.rid] = seq
        self.waiting.add(seq, now)

    def cancel(self, rid: int, reason: FinishReason, now: float, error: ErrorInfo | None = None) -> TokenEvent | None:
        """End a request from outside: its final event, or None if it has ended already."""
        seq = self._sequences.get(rid)
        return None if seq is None else self._finish(seq, reason, now, error)

    def why(self, now: float, rids: Collection[int] = ()) -> list[Why]:
        """What each of `rids` (all waiting requests if empty) waits for. Unknown ids are left out."""
        self._begin(now)
        line = self.waiting.line(now)
        place = {seq.rid: position for position, seq in enumerate(line)}
        wanted = [self._sequences[rid] for rid in rids if rid in self._sequences] if rids else line
        return [self._explain(seq, place.get(seq.rid, -1), now) for seq in wanted]

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    # A step

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute."""
        draft = _Draft()
        self._begin(now)
        self._continue_running(draft, now)
        # Who was just put back must not board again at once: the blocks it gave are meant for others.
        if not draft.preempted:
            self._board(draft, now)
        if not draft.rows:
            return None
        self._step += 1
        release, self._release = self._release, []
        return StepPlan(self._step, release, draft.admit, list(draft.rows.values()), [])

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Take in what a step has computed. Returns news in the plan's order of rows."""
        faults = {fault.row: fault for fault in result.faults}
        events = []
        for number, row in enumerate(plan.rows):
            seq = self._sequences.get(row.rid)
            if seq is None or seq.epoch != row.epoch or seq.state is not State.RUNNING:
                continue  # cancelled or preempted while the step was under way
            fault = faults.get(number)
            if fault is not None:
                # What made it fail may already be in its earlier blocks: nobody may build on them.
                self.pool.forget(seq.blocks)
                events.append(self._finish(seq, FinishReason.FAILED, now, ErrorInfo(fault.code, fault.message)))
                continue
            seq.committed = max(seq.committed, row.start + row.count)
            event = self._append(seq, result.tokens[number], now) if row.emit else None
            self._publish(seq)
            if event is not None:
                events.append(event)
        self._budget.learn(plan, result.seconds)
        return events

    def check(self) -> None:
        """Raise AssertionError unless all invariants hold. For tests; linear in everything."""
        self.pool.check([seq.blocks for seq in self.running])
        slots = [seq.slot for seq in self.running]
        if sorted(slots + self._slots.free) != list(range(self.resources.slots)):
            raise AssertionError(f"slots are lost or doubled: running {slots}, free {self._slots.free}")
        waiting = list(self.waiting)
        if {s.rid for s in self.running} | {s.rid for s in waiting} != set(self._sequences):
            raise AssertionError("a sequence is neither running nor waiting")
        for seq in self.running:
            if seq.state is not State.RUNNING or len(seq.blocks) * self.resources.block_size < seq.computed:
                raise AssertionError(f"running request {seq.rid} is {seq.state} with {len(seq.blocks)} blocks")
        for seq in waiting:
            if seq.state is not State.QUEUED or seq.blocks or seq.computed or seq.pending or seq.slot != -1:
                raise AssertionError(f"waiting request {seq.rid} holds something")

    # How a step is planned

    def _begin(self, now: float) -> None:
        self._tokens.fill(self._budget.tokens(self.running))
        for limit in self._limits:
            limit.begin(self.running, lambda: self.waiting.line(now))

    def _continue_running(self, draft: _Draft, now: float) -> None:
        for seq in list(self.running):
            if seq.state is not State.RUNNING:
                continue  # put back for the sake of an earlier one
            count, holder = self._cap(seq)
            while count <= 0 and holder is self._blocks and self._put_back(draft, now):
                if seq.state is not State.RUNNING:
                    break
                count, holder = self._cap(seq)
            if count > 0 and seq.state is State.RUNNING:
                self._run(seq, count, draft)

    def _put_back(self, draft: _Draft, now: float) -> bool:
        """Preempt somebody, perhaps the one that needs blocks. The oldest running sequence never has to give way, so
        there is always progress. False if nobody else runs."""
        candidates = self.running[1:]
        if not candidates:
            return False
        victim = self._victim.pick(candidates)
        row = draft.rows.pop(victim.rid, None)
        if row is not None:
            for limit in self._limits:
                limit.grant(victim, -row.count)
        self._vacate(victim)
        victim.move(State.QUEUED)
        victim.preemptions += 1
        victim.computed = victim.committed = victim.pending = victim.published = 0
        self.counters.preemptions += 1
        self.waiting.add(victim, now)
        draft.preempted = True
        return True

    def _board(self, draft: _Draft, now: float) -> None:
        if not self._slots.free or self._tokens.left <= 0:
            return
        looked = 0
        for seq in self.waiting.line(now)[:_LOOK]:
            self._match(seq)
            count, holder = self._cap(seq)
            if count > 0:
                self._admit(seq, draft, now)
                self._run(seq, count, draft)
            else:
                self._unmatch(seq)
                if holder is None or not holder.passable:
                    break
            looked += 1
        self.waiting.leave(looked)

    def _cap(self, seq: Sequence) -> tuple[int, Limit | None]:
        """How many tokens `seq` may run, and the limit that held it to that."""
        count, holder = seq.want, None
        for limit in self._limits:
            if count <= 0:
                break
            allowed = limit.cap(seq, count)
            if allowed < count:
                count, holder = allowed, limit
        return count, holder

    def _match(self, seq: Sequence) -> None:
        """Look up the cached beginning of a waiting sequence. At least one token stays to be computed."""
        if self.resources.prefix_caching:
            self._keys.extend(seq.keys, seq.tokens, seq.request.salt, len(seq.tokens))
            seq.blocks = self.pool.match(seq.keys[: (len(seq.tokens) - 1) // self.resources.block_size])
            seq.computed = len(seq.blocks) * self.resources.block_size

    def _unmatch(self, seq: Sequence) -> None:
        seq.blocks, seq.computed = [], 0

    def _admit(self, seq: Sequence, draft: _Draft, now: float) -> None:
        self.pool.share(seq.blocks)
        self._shared.boards(seq)
        seq.move(State.RUNNING)
        seq.epoch += 1
        seq.slot = self._slots.free.pop()
        seq.published = len(seq.blocks)
        seq.committed = seq.computed
        self.running.append(seq)
        if seq.first_scheduled is None:
            seq.first_scheduled = now
            seq.cached = seq.computed
            self.counters.cache_queries += seq.prompt_len
            self.counters.cache_hits += seq.computed
            self.counters.prompt_tokens += seq.prompt_len
        draft.admit.append(
            Admit(
                seq.rid, seq.epoch, seq.slot, list(seq.tokens), seq.prompt_len, seq.computed, list(seq.blocks),
                seq.request.sampling, seq.request.eos_ids,
            )
        )  # fmt: skip

    def _run(self, seq: Sequence, count: int, draft: _Draft) -> None:
        needed = -(-(seq.computed + count) // self.resources.block_size) - len(seq.blocks)
        blocks = self.pool.alloc(needed) if needed > 0 else []
        if blocks is None:
            raise RuntimeError(f"{needed} blocks were promised to request {seq.rid} but {self.pool.available} are free")
        seq.blocks += blocks
        emit = count == seq.want
        draft.rows[seq.rid] = Row(seq.rid, seq.epoch, seq.slot, seq.computed, count, emit, blocks)
        seq.computed += count
        seq.pending += emit
        for limit in self._limits:
            limit.grant(seq, count)

    # How a step ends

    def _append(self, seq: Sequence, tokens: list[int], now: float) -> TokenEvent:
        if not tokens:
            error = ErrorInfo("RW-ENGINE", f"The executor returned no token for request {seq.rid}.")
            return self._finish(seq, FinishReason.FAILED, now, error)
        if seq.first_token is None:
            seq.first_token = now
        seq.pending -= 1
        new: list[int] = []
        for token in tokens:
            seq.tokens.append(token)
            new.append(token)
            self.counters.generation_tokens += 1
            reason = finish_after(seq, self.resources.max_model_len)
            if reason is not None:
                self._publish(seq)
                return self._finish(seq, reason, now, tokens=new)
        return TokenEvent(seq.rid, new, cached_tokens=seq.cached)

    def _publish(self, seq: Sequence) -> None:
        """Offer the full blocks that have come back from the device to the prefix cache: never before, so that a
        failed step poisons nothing."""
        full = seq.committed // self.resources.block_size
        if not self.resources.prefix_caching or full <= seq.published:
            return
        self._keys.extend(seq.keys, seq.tokens, seq.request.salt, seq.committed)
        for index in range(seq.published, full):
            self.pool.publish(seq.blocks[index], seq.keys[index])
        self._shared.settle(seq, seq.keys[seq.published : full])
        seq.published = full

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        now: float,
        error: ErrorInfo | None = None,
        tokens: list[int] | None = None,
    ) -> TokenEvent:
        if seq.state is State.RUNNING:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        seq.finish = reason
        seq.move(State.FINISHED)
        del self._sequences[seq.rid]

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - seq.arrival

        usage = Usage(
            prompt_tokens=seq.prompt_len, completion_tokens=seq.output_len, cached_tokens=seq.cached,
            preemptions=seq.preemptions, first_scheduled_s=since(seq.first_scheduled),
            first_token_s=since(seq.first_token), total_s=now - seq.arrival,
        )  # fmt: skip
        return TokenEvent(
            seq.rid, tokens or [], cached_tokens=seq.cached, finish=reason, stop_token=stop_token(seq), error=error,
            usage=usage,
        )  # fmt: skip

    def _vacate(self, seq: Sequence) -> None:
        """Give back seat and blocks. Plans run in order, so the next plan may hand both out again even while a step
        that uses them is still under way."""
        self.running.remove(seq)
        self._shared.settle(seq, seq.keys[seq.published :])
        self.pool.release(seq.blocks)
        seq.blocks = []
        self._slots.free.append(seq.slot)
        self._release.append(seq.slot)
        seq.slot = -1

    # What people may ask

    def _check_fits(self, request: GenerateRequest) -> None:
        res = self.resources
        prompt, wanted = len(request.tokens), request.sampling.max_tokens
        if prompt < 1 or wanted < 1:
            raise RequestError(
                f"A request needs at least one prompt token and one token to generate, not {prompt} and {wanted}."
            )
        if prompt >= res.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {res.max_model_len} tokens. However, your prompt has {prompt} "
                "tokens, which leaves no room for an answer. Please shorten it."
            )
        total = min(prompt + wanted, res.max_model_len)
        needed = -(-total // res.block_size)
        if needed > res.num_blocks:
            raise NeverFitsError(
                f"The request may grow to {total} tokens ({prompt} of prompt, {wanted} to generate), which needs "
                f"{needed} KV blocks of {res.block_size} tokens; this server has {res.num_blocks}. Ask for at most "
                f"{max(0, res.num_blocks * res.block_size - prompt)} tokens, or raise --kv-cache-gib."
            )
        if not res.chunked_prefill and total > res.max_step_tokens:
            raise NeverFitsError(
                f"The request may grow to {total} tokens, but without chunked prefill all of a sequence must fit one "
                f"step of {res.max_step_tokens} tokens. Shorten it, or start with --enable-chunked-prefill."
            )

    def _explain(self, seq: Sequence, position: int, now: float) -> Why:
        if seq.state is State.RUNNING:
            reason = f"it runs: {seq.computed} of {len(seq.tokens)} known tokens are computed"
            return Why(seq.rid, seq.state.value, position, "", reason)
        self._match(seq)
        _, holder = self._cap(seq)
        why = holder.why(seq) if holder is not None else "it boards with the next step"
        self._unmatch(seq)
        if position > 0 and not (holder is not None and holder.passable):
            reason = f"{position} requests stand before it; {self.waiting.order.explain(seq, now)}"
            return Why(seq.rid, seq.state.value, position, self.waiting.order.name, reason)
        return Why(seq.rid, seq.state.value, position, holder.name if holder else "", why)
