"""What a server adds is found again from its engine's journal and its clients' clocks, where it is known."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
from simkit import small_config, small_profile

from ropeway.contract import GenerateRequest, Submit
from ropeway.errors import EngineError
from ropeway.recorder.recorder import RecordedEngine
from ropeway.sim import TimedExecutor, VirtualClock
from ropeway.sim.profile import Serving
from ropeway.sim.served import kinds, observe
from ropeway.sim.serving import Level, fit_serving
from ropeway.sim.workload import Arrival, alone

TRUE = Serving(
    request=0.006, arrive=0.02, arrive_busy=0.03, prompt_token=1e-4, wake=0.004, step=0.003, row=2e-4, join=0.0015,
    deliver=0.002, deliver_row=5e-4,
)  # fmt: skip


class Server:
    """A server in virtual time, with a journal, whose parts take what `TRUE` says."""

    def __init__(self, journal: Path, jitter: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())) -> None:
        profile, config = small_profile(), small_config(max_num_seqs=16, journal=str(journal))
        self.clock = VirtualClock()
        self.executor = TimedExecutor(profile.executor_info(config), profile.cost, self.clock, jitter=jitter)
        self.engine = RecordedEngine(self.executor, config, clock=self.clock, secret=b"server")
        self._rid = 0

    def serve(self, name: str, arrivals: list[Arrival]) -> Level:
        clients, coming = deque(arrivals), deque[tuple[float, GenerateRequest]]()
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        clock, engine, free, stepped = self.clock, self.engine, 0.0, False
        while clients or coming or engine.busy:
            while clients and clients[0].at <= clock.now():
                arrival = clients.popleft()
                free = max(free, arrival.at) + TRUE.request + TRUE.prompt_token * arrival.prompt_len
                self._rid += 1
                way = TRUE.arrive + (TRUE.arrive_busy if stepped else 0.0)
                coming.append((free + way, arrival.request(self._rid)))
            due = []
            while coming and coming[0][0] <= clock.now():
                due.append(Submit(coming.popleft()[1]))
            if due:
                idle = not engine.busy
                engine.submit(due)
                clock.advance(TRUE.wake if idle else TRUE.join * len(due))
            stepped = engine.busy
            if not stepped:
                clock.advance_to(min(one.at if isinstance(one, Arrival) else one[0] for one in (*clients, *coming)))
                continue
            step = engine.step()
            told = clock.now() + TRUE.deliver + TRUE.deliver_row * self.executor.emits
            for event in step.events:
                if event.tokens:
                    first.setdefault(event.rid, told)
                    last[event.rid] = told
            clock.advance(TRUE.step + TRUE.row * self.executor.emits)
        rids = sorted(first)
        return Level(name, [a.at for a in arrivals], [first[rid] for rid in rids], [last[rid] for rid in rids])

    def traffic(self) -> list[Level]:
        """One after the other with pauses, many at once, and one now and then."""
        levels = []
        for name, gap, count in (("alone", 2.0, 12), ("at once", 0.0, 60), ("now and then", 0.11, 30)):
            at = self.clock.now() + 5
            levels.append(self.serve(name, [alone(at + gap * n, (8, 48)[n % 2], 6 + n % 9, n) for n in range(count)]))
        return levels


def test_what_serving_adds_is_found_again(tmp_path: Path) -> None:
    server = Server(tmp_path)
    levels = server.traffic()
    server.engine.close()
    record = observe(tmp_path)
    assert len(record.requests) == 102
    assert len(record.steps) == server.executor.steps
    found, parts = fit_serving(small_profile().cost, record, levels)
    assert found.step == pytest.approx(TRUE.step, rel=1e-3)
    assert found.row == pytest.approx(TRUE.row, rel=1e-3)
    assert found.join == pytest.approx(TRUE.join, rel=1e-3)
    assert found.wake == pytest.approx(TRUE.wake, rel=1e-3)
    assert found.prompt_token == pytest.approx(TRUE.prompt_token, rel=1e-3)
    assert found.request + found.arrive == pytest.approx(TRUE.request + TRUE.arrive, rel=0.01)
    assert found.arrive_busy == pytest.approx(TRUE.arrive_busy, abs=0.01)
    assert found.request == pytest.approx(TRUE.request + TRUE.prompt_token * 28, rel=0.25)
    assert found.deliver == pytest.approx(TRUE.deliver, rel=1e-3)
    assert found.deliver_row == pytest.approx(TRUE.deliver_row, rel=1e-3)
    assert [part.name for part in parts] == ["arrive", "busy", "wake", "between", "deliver"]
    assert all(part.off < 1e-5 for part in parts if part.name != "busy"), parts
    assert all(abs(value) < 1e-5 for values in (*found.jitter, found.deliver_jitter) for value in values)


def test_jitter_is_kept_in_parts_and_the_recorder_is_taken_off(tmp_path: Path) -> None:
    jitter = tuple(0.001 * n for n in range(-5, 6))
    server = Server(tmp_path, (jitter, jitter))
    levels = server.traffic()
    server.engine.close()
    record = observe(tmp_path)
    cost = small_profile().cost
    found, parts = fit_serving(cost, record, levels)
    assert max(found.jitter[0]) - min(found.jitter[0]) == pytest.approx(0.01, rel=0.2)
    # In the mean, constants and jitter together are what was there.
    steps = [step for step in record.steps if not step.cold]
    made = sum(found.step + found.row * step.told + found.join * step.joined for step in steps)
    made += sum(sum(part) / len(part) for part in (found.jitter[step.reads] for step in steps))
    rest = sum(step.period - cost.of(step.sample.tokens, step.sample.context, step.sample.emits) for step in steps)
    assert made == pytest.approx(rest, rel=1e-3)
    assert parts[3].off < 0.005
    less, _ = fit_serving(cost, record, levels, (0.001, 0.0))
    assert less.step == pytest.approx(found.step - 0.001)


def test_kinds_of_steps_are_those_that_occurred(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.traffic()
    server.engine.close()
    record = observe(tmp_path)
    found = kinds(record.steps, most=10)
    assert 1 < len(found) <= 10
    cost = small_profile().cost
    for sample in found:
        assert sample.seconds == pytest.approx(cost.of(sample.tokens, sample.context, sample.emits), rel=0.25)
    assert found[0].tokens == found[0].emits, "most steps decode"


def test_requests_of_somebody_else_are_noticed(tmp_path: Path) -> None:
    server = Server(tmp_path)
    levels = server.traffic()
    server.engine.close()
    for times in (levels[1].sent, levels[1].first, levels[1].last):
        times.pop()
    with pytest.raises(EngineError, match="sent 59 requests, but the engine's journal has 60"):
        fit_serving(small_profile().cost, observe(tmp_path), levels)
