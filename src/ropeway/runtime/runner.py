"""Carry out plans: seat and unseat sequences, compute their rows, choose tokens, and keep faults apart.

A step has two halves. `begin` queues its work on the device, `finish` waits for its tokens; on a CPU the work is done
in the first. Several steps may be open: the one that follows is planned and queued while the one before is computed.
That needs tokens which the host does not know yet (see `ropeway.runtime.ondevice`). If the host has to choose a token
itself, or has to know one in order to do so, `begin` first finishes what is under way: one step without overlap.

Why several open steps do not harm one another, although they share slots, block tables and KV blocks:

- The device carries out steps one after another (see `ropeway.runtime.lane`). A block that one plan frees and the next
  hands out is written by the second only after the first has read it. A copy to or from another tier keeps that order.
- What a step reads of slots and tables was copied for it when it began; the runner changes its own as plans come.
- A slot may be handed to another sequence while its last one has a token on the way. The token is then for a seat that
  is no longer there, and is dropped; on the device the heir's own tokens come later in the queue.
- A row that follows one whose token could not be chosen computes nonsense, in blocks of its own sequence only. Nobody
  reads it: whoever made the plan ends the sequence with the first fault.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from msgspec.structs import replace as changed
from torch import Tensor

from ropeway.contract import Extra, RowFault, StepPlan, StepResult, TokenLogprob
from ropeway.errors import EngineError, NumericalError, RopewayError
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.device_memory import CpuMemory, DeviceMemory
from ropeway.runtime.gather import gather
from ropeway.runtime.graphs import Graphs
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.lane import Fetch, Lane
from ropeway.runtime.noise import derive
from ropeway.runtime.ondevice import DeviceTokens, alone
from ropeway.runtime.pooling import Pool
from ropeway.runtime.sampler import Sampler, Want, no_token
from ropeway.runtime.slots import Slots
from ropeway.runtime.ticket import Coming, Pace, Ticket


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """Logits (E, vocab) float32 of the step's `logits_rows`; K and V of its tokens are written to `kv`."""

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """The same as far as the head: final states (E, hidden)."""

    def logits(self, states: Tensor) -> Tensor:
        """Logits (E, vocab) float32 of final states (E, hidden)."""


_PIECE = 16
"""Positions that the head is computed for at once, at least, where a whole prompt's logits are wanted."""


class Runner:
    """`seed` stands in for requests that bring none. With `tokens` the device chooses what it can by itself, without
    them the host chooses all. `graphs` may be set at any time at which no step is open."""

    def __init__(
        self,
        model: Model,
        kv: KVStore,
        slots: Slots,
        sampler: Sampler,
        lane: Lane,
        seed: int,
        *,
        tokens: DeviceTokens | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        self.model, self.kv, self.slots, self.sampler, self.lane, self.seed = model, kv, slots, sampler, lane, seed
        self.tokens, self.memory = tokens, memory or CpuMemory()
        self.graphs: Graphs | None = None
        self.pace = Pace()
        self._open: deque[Ticket] = deque()  # those that are not settled, oldest first
        self._ended: Any = None  # the mark at the end of the last one
        self._left = time.monotonic()  # when the device was last seen at work
        self._busy = threading.Lock()  # held by who queues work: a step, or the recording of one

    def step(self, plan: StepPlan) -> StepResult:
        """Execute `plan`, start to end."""
        return self.finish(self.begin(plan))

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Ticket:
        """Start `plan`. A row that cannot be computed is a fault of that row alone; the others are as without it."""
        with self._busy:
            self._catch_up(plan)
            moving = self.kv.begin(plan.copies)
            boarded = len(plan.admit) < len(plan.rows)  # somebody, before this plan
            ticket = Ticket(plan, moving, self.lane.mark(), self._ended if boarded else None)
            self._seat(plan)
            for number, row in enumerate(plan.rows):
                try:
                    self.slots.extend(row)
                    ticket.sound.append(number)
                except RopewayError as error:
                    ticket.faults[number] = error
                    continue
                seat = self.slots.taken[row.slot]
                if row.emit and seat.pool is None and not alone(seat):
                    ticket.wants[number] = Want(seat, self.slots.sequence(row.slot))
            self.sampler.begin(list(ticket.wants.values()))
            self._compute(ticket, ticket.sound)
            ticket.ended = self._ended = self.lane.mark()
            self._open.append(ticket)
            return ticket

    def finish(self, ticket: Ticket) -> StepResult:
        """Wait for a step, the oldest first."""
        if not ticket.settled:
            with torch.inference_mode():
                self._settle(ticket)
        copy_seconds, lost = ticket.moving.finish()
        return StepResult(
            step=ticket.plan.step,
            tokens=ticket.tokens,
            faults=[
                RowFault(number, fault.code, fault.message, fault.param)
                for number, fault in sorted(ticket.faults.items())
            ],
            seconds=ticket.seconds + sum(copy_seconds),
            copy_seconds=copy_seconds,
            lost=lost,
            extras=[extra for number, extra in sorted(ticket.extras.items()) if number not in ticket.faults],
        )

    @torch.inference_mode()
    def capture(self, quiet: float = 0.0) -> bool:
        """Record another step (see `ropeway.runtime.graphs`), unless one is under way or was less than `quiet` seconds
        ago. Returns whether any are missing then. May be called from another thread."""
        with self._busy:
            if self.graphs is None:
                return False
            if self._open or time.monotonic() - self._left < quiet:
                return bool(self.graphs.missing)
            return self.graphs.capture()

    # Beginning

    def _catch_up(self, plan: StepPlan) -> None:
        """Settle what is under way if the host has to know or to choose its tokens before the next step."""
        taken = self.slots.taken
        if self._open and (
            any(ticket.on_host for ticket in self._open)
            or any(row.emit and row.slot in taken and not alone(taken[row.slot]) for row in plan.rows)
        ):
            self._settle(self._open[-1])

    def _seat(self, plan: StepPlan) -> None:
        for slot in plan.release:
            self.slots.release(slot)
        for admit in plan.admit:
            seed = admit.sampling.seed
            self.slots.admit(admit, derive(self.seed, admit.rid) if seed is None else seed)
            self.sampler.board(admit.sampling)
            if self.tokens is not None:
                self.tokens.board(self.slots.taken[admit.slot])

    def _compute(self, ticket: Ticket, numbers: list[int]) -> None:
        """Launch the rows `numbers`. If that raises they are tried again in halves until the one that is to blame
        stands alone: writing K and V twice changes nothing. Raises if the device is lost, and no row to blame."""
        if not numbers:
            return
        try:
            self._launch(ticket, numbers)
            return
        except Exception as error:
            short = self.memory.describe(error)
            told = f"failed: {short}" if short else f"failed with {type(error).__name__}: {error}."
        self.lane.check()
        if self._open:
            self._settle(self._open[-1])  # what was launched may have taken the place of the tokens that it needs
        if short:
            self.memory.release()  # only now: the exception held on to the step's tensors
        if len(numbers) == 1:
            ticket.faults[numbers[0]] = EngineError(f"Computing the row {told}")
            return
        half = len(numbers) // 2
        self._compute(ticket, numbers[:half])
        self._compute(ticket, numbers[half:])

    def _launch(self, ticket: Ticket, numbers: list[int]) -> None:
        rows = [ticket.rows[n] for n in numbers]
        if self.graphs is not None and (replay := self.graphs.load(rows)) is not None:
            self._launched(ticket)
            replay()
            self._choose_recorded(ticket, numbers, self.graphs)
            return
        inputs = gather(rows, self.slots, self.lane)
        self._launched(ticket)
        if self.tokens is not None:
            inputs = replace(inputs, token_ids=self.tokens.fill(inputs.token_ids))
        seats = [self.slots.taken[row.slot] for row in rows]
        if all(seat.pool is None and seat.sampling.prompt_logprobs is None for seat in seats):
            self._choose(ticket, [n for n in numbers if ticket.rows[n].emit], self.model.forward(inputs, self.kv.data))
            return
        logits, pooled = self._from_states(ticket, numbers, inputs)
        ends = [(n, seat.pool) for n, row, seat in zip(numbers, rows, seats, strict=True) if row.emit]
        self._choose(ticket, [n for n, pool in ends if pool is None], logits)
        for pool, states in pooled:
            pool.take(states.float())
        ticket.pooled += [(n, pool) for n, pool in ends if pool is not None]

    def _launched(self, ticket: Ticket) -> None:
        if ticket.launched is None:
            ticket.launched = self.lane.mark()

    def _from_states(
        self, ticket: Ticket, numbers: list[int], inputs: BatchInputs
    ) -> tuple[Tensor, list[tuple[Pool, Tensor]]]:
        """For steps in which rows make something else of their final states than a token: what is wanted of prompts is
        told, and the states that go into vectors are returned, after the logits of rows that get a token."""
        states = self.model.hidden(inputs, self.kv.data)
        rows = [ticket.rows[n] for n in numbers]
        seats = [self.slots.taken[row.slot] for row in rows]
        tails = torch.split(states, [seat.tail(row) for seat, row in zip(seats, rows, strict=True)])
        last = [tail[-1:] for row, seat, tail in zip(rows, seats, tails, strict=True) if row.emit and seat.pool is None]
        logits = self.model.logits(torch.cat([states[:0], *last]))
        pooled = []
        for number, row, seat, tail in zip(numbers, rows, seats, tails, strict=True):
            if seat.pool is not None:
                pooled.append((seat.pool, tail))
            elif seat.told(row):
                self._tell(ticket, number, tail[: seat.told(row)])
        return logits, pooled

    def _tell(self, ticket: Ticket, number: int, states: Tensor) -> None:
        """How likely the prompt's tokens behind a row's first positions were, by the final `states` there. The head is
        computed in pieces: the logits of a chunk of a prompt would take far more memory than a step has."""
        row = ticket.rows[number]
        count = self.slots.taken[row.slot].sampling.prompt_logprobs or 0
        told: list[TokenLogprob] = []
        for piece in torch.split(states, max(_PIECE, len(self.slots.tokens))):
            begin = row.start + 1 + len(told)
            tokens = self.slots.tokens[row.slot, begin : begin + len(piece)].tolist()
            for entry in self.sampler.logprobs(self.model.logits(piece), tokens, [count] * len(piece)):
                if isinstance(entry, RopewayError):
                    ticket.faults[number] = entry
                    return
                told.append(entry)
        ticket.extras[number] = Extra(row.rid, prompt_logprobs=told, prompt_at=row.start + 1)

    def _choose(self, ticket: Ticket, numbers: list[int], logits: Tensor) -> None:
        """Have tokens chosen for the rows `numbers`, whose `logits` these are: by the device now, or by the host when
        the step is settled."""
        hosts = [place for place, n in enumerate(numbers) if n in ticket.wants]
        if self.tokens is not None and len(hosts) < len(numbers):
            ours, theirs = [n for n in numbers if n not in ticket.wants], logits[:0]
            if hosts:
                theirs = self._pick(logits, hosts)
                logits = self._pick(logits, [place for place, n in enumerate(numbers) if n not in ticket.wants])
            self._expect(ticket, ours, self.tokens.choose(logits, [ticket.rows[n].slot for n in ours]))
            logits = theirs
        if hosts:
            ticket.parts.append(([numbers[place] for place in hosts], logits))

    def _choose_recorded(self, ticket: Ticket, numbers: list[int], graphs: Graphs) -> None:
        """The same after a recorded step, in which the device has chosen for all of the rows."""
        hosts = [place for place, n in enumerate(numbers) if n in ticket.wants]
        parts = [([numbers[place] for place in hosts], self.model.logits(graphs.states(hosts)))] if hosts else []
        if len(hosts) < len(numbers):
            self._expect(ticket, numbers, graphs.fetch(len(numbers)))
        ticket.parts += parts

    def _pick(self, logits: Tensor, places: Sequence[int]) -> Tensor:
        (index,) = self.lane.stage(np.array(places, dtype=np.int64))
        return logits[index]

    def _expect(self, ticket: Ticket, numbers: list[int], fetch: Fetch) -> None:
        """The tokens of the rows `numbers` are on their way, except for those that the host chooses."""
        coming = []
        for place, number in enumerate(numbers):
            if number not in ticket.wants:
                slot = ticket.rows[number].slot
                coming.append(Coming(number, self.slots.taken[slot], self.slots.expect(slot), place))
        ticket.coming.append((fetch, coming))

    # Ending

    def _settle(self, ticket: Ticket) -> None:
        """Wait for the tokens of `ticket` and of all before it."""
        while not ticket.settled:
            oldest = self._open[0]
            oldest.seconds = self.lane.seconds(oldest.begun, oldest.ended)
            self.pace.busy += oldest.seconds
            if oldest.before is not None and oldest.launched is not None:
                self.pace.idle += self.lane.seconds(oldest.before, oldest.launched)
            begun = time.perf_counter()
            for numbers, logits in oldest.parts:
                self._emit(oldest, numbers, logits)
            for number, pool in oldest.pooled:
                self._pool(oldest, number, pool)
            for fetch, coming in oldest.coming:
                self._take(oldest, fetch.wait().tolist(), coming)
            oldest.parts, oldest.pooled, oldest.coming = [], [], []
            oldest.seconds += time.perf_counter() - begun
            oldest.settled = True
            self._left = time.monotonic()
            self._open.popleft()

    def _take(self, ticket: Ticket, tokens: list[int], coming: list[Coming]) -> None:
        for one in coming:
            token = tokens[one.place]
            if token < 0:
                ticket.faults[one.number] = no_token(token)
            else:
                ticket.tokens[one.number].append(token)
            self.slots.put(ticket.rows[one.number].slot, one.seat, one.at, token)

    def _pool(self, ticket: Ticket, number: int, pool: Pool) -> None:
        """The vector of a prompt that ends with the row `number`, with a token that means nothing."""
        try:
            ticket.extras[number] = Extra(ticket.rows[number].rid, vector=pool.vector().numpy().tobytes())
            ticket.tokens[number].append(0)
        except NumericalError as error:
            ticket.faults[number] = error

    def _emit(self, ticket: Ticket, numbers: list[int], logits: Tensor) -> None:
        """Choose a token for each of the rows `numbers`; `logits` are theirs, in order."""
        wants = [ticket.wants[n] for n in numbers]
        asking = [i for i, want in enumerate(wants) if want.seat.sampling.logprobs is not None]
        raw = logits[asking] if asking else logits[:0]  # a copy: sampling may change them
        for number, choice in zip(numbers, self.sampler.sample(logits, wants), strict=True):
            if isinstance(choice, RopewayError):
                ticket.faults[number] = choice
            else:
                ticket.tokens[number].append(choice)
                self.slots.append(ticket.rows[number].slot, choice)
        if asking:
            self._rate(ticket, [numbers[i] for i in asking], raw)

    def _rate(self, ticket: Ticket, numbers: list[int], logits: Tensor) -> None:
        """How likely the tokens were that the rows `numbers` have just got."""
        tokens = [ticket.tokens[n][-1] if ticket.tokens[n] else 0 for n in numbers]
        counts = [ticket.wants[n].seat.sampling.logprobs or 0 for n in numbers]
        for number, entry in zip(numbers, self.sampler.logprobs(logits, tokens, counts), strict=True):
            if isinstance(entry, RopewayError):
                ticket.faults.setdefault(number, entry)
            else:
                extra = ticket.extras.get(number) or Extra(ticket.rows[number].rid)
                ticket.extras[number] = changed(extra, logprobs=[entry])
