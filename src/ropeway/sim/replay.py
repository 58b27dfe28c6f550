"""Let an engine live its recorded life again, and stop where it decides otherwise.

The engine is made from the state in a journal's header and runs the real code: `Tape` gives it the recorded answers of
clock and executor, commands come as they came, and every plan and every end of a request is compared with the record.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path

from ropeway.contract import Report, Step, Submit
from ropeway.engine.engine import Engine
from ropeway.errors import ConfigError
from ropeway.recorder.journal import WORLD, Closed, Cut, Header, ended, files, read
from ropeway.recorder.snapshot import thaw
from ropeway.sim.biography import Biography
from ropeway.sim.tape import Call, Difference, EndOfRecord, RecordedFailure, Tape, calls
from ropeway.sim.witness import Witness


@dataclass
class Summary:
    """What a replay has seen. `seconds` are the recorded engines' own; `waits` are those that waited longest to board,
    as (seconds, request); `notes` are sentences about how records end."""

    headers: list[tuple[Path, Header]] = field(default_factory=list)
    requests: int = 0
    steps: int = 0
    first_step: int = 0
    last_step: int = 0
    tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    finishes: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[float, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    biographies: list[Biography] = field(default_factory=list)
    witnesses: list[Witness] = field(default_factory=list)
    difference: Difference | None = None


def replay(path: Path, *, until: int | None = None, explain: int | None = None, watch: bool = False) -> Summary:
    """Replay a journal: a directory of files in order, or one file. Ends after step `until`, or at the first
    difference; keeps the biography of request `explain`, and with `watch` the lives of all requests, one for each
    engine's life.

    Raises ConfigError for what is no journal, and for a state that this version cannot make again.
    """
    summary = Summary()
    life: _Life | None = None
    try:
        for file in files(path):
            header, items = read(file)
            summary.headers.append((file, header))
            if life is None or not life.goes_on_in(header):
                life = _Life(file, header, summary, explain, watch)
            life.header = header
            for call in calls(items):
                match call:
                    case Call():
                        life.live(call)
                        if until is not None and summary.last_step >= until:
                            return summary
                    case Cut(lost):
                        summary.notes.append(f"{file.name} ends within a frame; its last {lost} bytes are left out.")
                        life.over = True
                    case Closed():
                        life.over = True
            summary.seconds += max(0.0, life.tape.moment - header.clock)
        if life is not None and not life.over:
            summary.notes.append("The record ends without an orderly end: the engine was killed, or is still running.")
    except Difference as difference:
        summary.difference = difference
    return summary


class _Life:
    """One engine, from the state that a file begins with."""

    def __init__(self, file: Path, header: Header, summary: Summary, explain: int | None, watch: bool) -> None:
        self.header = header
        self.over = False
        self.tape = Tape(header.info)
        self._summary = summary
        self._engine = Engine.__new__(Engine)
        try:
            vars(self._engine).update(thaw(header.state, {WORLD: self.tape}))
        except (ImportError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise ConfigError(
                f"The state in {file} cannot be made again ({error}). Replay it with the version that recorded it, "
                f"{header.version}."
            ) from None
        self._biography: Biography | None = None
        if explain is not None:
            self._biography = Biography(explain, header.clock)
            summary.biographies.append(self._biography)
        self._witness: Witness | None = None
        if watch:
            self._witness = Witness(header, self._engine.scheduler)
            summary.witnesses.append(self._witness)

    def goes_on_in(self, header: Header) -> bool:
        return not self.over and (self.header.life, self.header.part + 1) == (header.life, header.part)

    def live(self, call: Call) -> None:
        """Make the engine do one call again. Raises Difference."""
        summary, counters = self._summary, self._engine.scheduler.counters
        preempted = counters.preemptions
        reports: list[Report] = []
        error = ""
        if call.plans:
            summary.last_step = call.plans[0].step
            summary.first_step = summary.first_step or summary.last_step
        self.tape.play(call)
        try:
            reports = [self._engine.step()] if call.commands is None else self._engine.submit(call.commands)
        except Difference:
            raise
        except EndOfRecord:
            summary.notes.append(f"Step {summary.last_step} was under way when the engine ended.")
            self.over = True
        except RecordedFailure:
            error = call.error
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        if call.whole:
            _check(call, error, reports)
        if error:
            summary.notes.append(f"The engine failed after step {summary.last_step}, and fails again: {error}")
        self._count(call, reports)
        summary.preemptions += counters.preemptions - preempted
        if self._biography is not None:
            self._biography.take(self._engine.scheduler, self.tape, call.commands or (), reports)
        if self._witness is not None:
            self._witness.take(self._engine.scheduler, self.tape, call.commands or (), reports)

    def _count(self, call: Call, reports: list[Report]) -> None:
        summary = self._summary
        summary.requests += sum(isinstance(command, Submit) for command in call.commands or ())
        summary.steps += len(self.tape.submitted)
        for report in reports:
            for event in report.events if isinstance(report, Step) else ():
                summary.tokens += len(event.tokens)
                if event.finish is not None:
                    summary.finishes[str(event.finish)] += 1
                if event.usage is not None and event.usage.first_scheduled_s is not None:
                    summary.waits = nlargest(3, [*summary.waits, (event.usage.first_scheduled_s, event.rid)])


def _check(call: Call, error: str, reports: list[Report]) -> None:
    """Compare how a call ended."""
    if error != call.error:
        raise Difference("the call ends otherwise", [call.error or "it returns"], [error or "it returns"])
    if call.plans:
        raise Difference("a recorded step is not planned", list(call.plans))
    if call.moments or call.results:
        raise Difference("the engine asks less often for the time or for results than recorded")
    found = ended(reports)
    if found != call.ended:
        raise Difference("other requests end", call.ended or ["nobody"], found or ["nobody"])
