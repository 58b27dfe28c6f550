"""The flight recorder: all that an engine is told and what it decides, in bounded files.

An engine is a state machine between a service, a clock and an executor. `Tap` stands where the last two are and writes
down what they answer; commands are written down as they come. So whatever an engine can learn is in its journal, and
the same engine, given the same answers, must do the same again (`ropeway.sim.replay`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropeway._version import __version__
from ropeway.config import EngineConfig
from ropeway.contract import Command, ExecutorInfo, FinishReason, Report, Step, StepPlan, StepResult
from ropeway.contract.clock import Clock, SystemClock
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine
from ropeway.errors import ConfigError
from ropeway.recorder import journal as record
from ropeway.recorder.snapshot import freeze

_FILES = 8
"""The bound is divided among so many files: the record loses its oldest eighth at a time."""

_log = logging.getLogger(__name__)


class Journal:
    """The files of one engine's life in `config.journal`, together with older ones at most `config.journal_mb`.

    Raises ConfigError if the first cannot be written. Later failures end the record with a warning: a recorder must
    not hurt what it records.
    """

    def __init__(self, config: EngineConfig, info: ExecutorInfo) -> None:
        self._directory = Path(config.journal or ".").expanduser()
        self._limit = config.journal_mb * 10**6
        self._config = dataclasses.asdict(config)
        self._info = info
        self._life = f"{time.time():.3f}-{os.getpid()}"
        self._parts = 0
        self._items: list[record.Item] = []
        self._file: record.Writer | None = None
        self._end = 0

    @property
    def full(self) -> bool:
        """Whether it is time for another file."""
        return self._file is not None and self._file.size >= self._end

    def begin(self, clock: float, state: list[list[Any]]) -> None:
        """Start a file with the engine's `state`, and remove as many old ones as it takes."""
        self._stop()
        self._parts += 1
        header = record.Header(
            version=__version__, life=self._life, part=self._parts, started=time.time(), clock=clock,
            config=self._config, info=self._info, state=state,
        )  # fmt: skip
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            old = record.numbered(self._directory)
            self._file = record.Writer(
                self._directory / f"{int(old[-1].stem) + 1 if old else 1:08d}{record.SUFFIX}", header
            )
            self._end = self._file.size + self._limit // _FILES
            excess = self._end + sum(path.stat().st_size for path in old) - self._limit
            for path in old:
                if excess > 0:
                    excess -= path.stat().st_size
                    path.unlink()
        except OSError as error:
            if self._parts == 1:
                raise ConfigError(
                    f"The journal cannot be written to {self._directory}: {error.strerror}. Check --journal.",
                    param="journal",
                ) from None
            self._give_up(error)

    def add(self, item: record.Item) -> None:
        self._items.append(item)

    def flush(self) -> None:
        items, self._items = self._items, []
        if items and self._file is not None:
            try:
                self._file.write(items)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        self.add(record.Closed())
        self.flush()
        self._stop()

    def _give_up(self, error: OSError) -> None:
        _log.warning("the journal in %s ends here, it cannot be written: %s", self._directory, error.strerror)
        self._stop()

    def _stop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Tap:
    """Between an engine and its world: clock and executor at once, whose answers it writes down."""

    def __init__(self, executor: Executor, clock: Clock, journal: Journal) -> None:
        self.info = executor.info
        self._executor = executor
        self._look = clock.now
        self._journal = journal
        self._moments: list[float] = []
        self._results: list[StepResult] = []
        self._tickets: deque[Any] = deque()

    def now(self) -> float:
        moment = self._look()
        self._moments.append(moment)
        return moment

    def submit(self, plan: StepPlan) -> int:
        moments, self._moments = self._moments, []
        self._journal.add(record.Planned(record.slim(plan), moments))
        self._journal.flush()  # before it runs: a step that kills this process is in the record
        self._tickets.append(self._executor.submit(plan))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        result = self._executor.collect(self._tickets.popleft())
        self._results.append(result)
        return result

    def close(self) -> None:
        self._executor.close()

    def answers(self) -> tuple[list[float], list[StepResult]]:
        """What clock and executor have said since this was last asked."""
        answers = self._moments, self._results
        self._moments, self._results = [], []
        return answers


class RecordedEngine(Engine):
    """An engine that keeps a journal in `config.journal`. Raises ConfigError if it cannot."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        clock: Clock | None = None,
        secret: bytes | None = None,
    ) -> None:
        self._journal = Journal(config, executor.info.public())
        self._tap = Tap(executor, clock or SystemClock(), self._journal)
        super().__init__(self._tap, config, clock=self._tap, secret=secret)
        self._begin()

    def submit(self, commands: Sequence[Command]) -> list[Report]:
        try:
            reports = super().submit(commands)
        except BaseException as failure:
            self._called(list(commands), [], failure)
            raise
        self._called(list(commands), record.ended(reports))
        return reports

    def step(self) -> Step:
        try:
            step = super().step()
        except BaseException as failure:
            self._called(None, [], failure)
            raise
        self._called(None, record.ended((step,)))
        return step

    def close(self) -> None:
        self._journal.close()
        super().close()

    def _called(
        self,
        commands: list[Command] | None,
        ended: list[tuple[int, FinishReason]],
        failure: BaseException | None = None,
    ) -> None:
        error = "" if failure is None else f"{type(failure).__name__}: {failure}"
        self._journal.add(record.Called(commands, *self._tap.answers(), ended, error))
        full = self._journal.full
        if full or error or not self.busy:
            self._journal.flush()
        if full:
            self._begin()

    def _begin(self) -> None:
        state = {name: value for name, value in vars(self).items() if name not in ("_journal", "_tap")}
        clock = self._tap.now()
        self._tap.answers()
        self._journal.begin(clock, freeze(state, {id(self._tap): record.WORLD}))


def make_engine(executor: Executor, config: EngineConfig) -> Engine:
    """The engine that `config` asks for: with a journal or without."""
    return (Engine if config.journal is None else RecordedEngine)(executor, config)
