"""The engine's loop and its door, on a fake executor under a virtual clock."""

from __future__ import annotations

import pytest

from invariants import check
from ropeway.config import EngineConfig
from ropeway.contract import (
    Cancel,
    Drain,
    ExecutorInfo,
    Explain,
    Explained,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Step,
    Submit,
    TokenEvent,
    Why,
)
from ropeway.engine.engine import Engine
from ropeway.sim import CostModel, FakeExecutor, VirtualClock, expected_tokens


def info(**changes: int) -> ExecutorInfo:
    values = {"num_blocks": 64, "block_size": 16, "max_slots": 4, "max_model_len": 512, "vocab_size": 100} | changes
    return ExecutorInfo(model="fake", device="sim", dtype="none", **values)  # type: ignore[arg-type]


class Driver:
    """An engine, its clock, and all that it has said."""

    def __init__(self, config: EngineConfig | None = None, fault=lambda rid, index: None, **changes: int) -> None:  # type: ignore[no-untyped-def]
        self.clock = VirtualClock()
        self.info = info(**changes)
        self.executor = FakeExecutor(self.info, clock=self.clock, cost=CostModel(base=0.1, per_token=0), fault=fault)
        self.engine = Engine(self.executor, config or EngineConfig(), clock=self.clock, secret=b"s")
        self.events: list[TokenEvent] = []

    def send(self, *commands) -> list:  # type: ignore[no-untyped-def, type-arg]
        reports = self.engine.submit(list(commands))
        for report in reports:
            if isinstance(report, Step):
                self.events += report.events
        return reports

    def ask(self, rid: int, prompt: int = 5, output: int = 4, **fields: object) -> GenerateRequest:
        request = GenerateRequest(
            rid=rid, tokens=list(range(prompt)), sampling=SamplingParams(max_tokens=output, seed=rid), **fields
        )  # type: ignore[arg-type]
        self.send(Submit(request))
        return request

    def steps(self, count: int = 10_000) -> None:
        for _ in range(count):
            if not self.engine.busy:
                return
            self.events += self.engine.step().events

    def final(self, rid: int) -> TokenEvent:
        finals = [event for event in self.events if event.rid == rid and event.finish is not None]
        assert len(finals) == 1, f"{len(finals)} final events of request {rid}"
        return finals[0]

    def tokens(self, rid: int) -> list[int]:
        return [token for event in self.events if event.rid == rid for token in event.tokens]


def test_an_accepted_request_hears_so_before_its_first_token_and_ends_once() -> None:
    driver = Driver()
    request = driver.ask(1)
    assert driver.events == [TokenEvent(1, accepted=True)]
    driver.steps()
    assert driver.tokens(1) == expected_tokens(request, driver.info)
    usage = driver.final(1).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 4)
    assert usage.first_scheduled_s == 0
    assert usage.first_token_s == pytest.approx(0.1)
    assert usage.total_s == pytest.approx(0.4)


def test_the_queue_is_bounded_and_the_hint_follows_the_measured_pace() -> None:
    driver = Driver(EngineConfig(max_queue=3, max_num_seqs=2), max_slots=2)
    for rid in range(5):
        driver.ask(rid, output=400)
        driver.steps(1)
    driver.clock.advance(20.0)
    for rid in range(5, 7):
        driver.ask(rid, output=400)
    refused = driver.final(6)
    assert refused.finish is FinishReason.REJECTED
    assert refused.error is not None
    assert refused.error.code == "RW-BUSY"
    assert "--max-queue 3" in refused.error.message
    assert refused.error.retry_after == pytest.approx(3 * 20.5 / 2)  # three wait; two have boarded in 20.5 s
    driver.steps()
    assert [driver.final(rid).finish for rid in range(3)] == [FinishReason.LENGTH] * 3


def test_pace_says_how_long_a_queue_takes() -> None:
    pace = Driver().engine.intake
    assert pace.wait(10, 0.0) == 1.0
    pace.boarded += [float(second) * 2 for second in range(11)]
    assert pace.wait(5, 20.0) == pytest.approx(5 * 20 / 11)
    assert pace.wait(5, 200.0) == pytest.approx(5 * 200 / 11)  # nobody has boarded since: it looks slower
    assert pace.wait(1000, 200.0) == 120.0


@pytest.mark.parametrize(
    ("prompt", "output", "code", "numbers"),
    [
        (512, 1, "RW-CTX", ["512"]),
        (0, 1, "RW-REQ", ["0"]),
        (200, 312, "RW-FIT", ["512", "32", "16", "20"]),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    prompt: int, output: int, code: str, numbers: list[str]
) -> None:
    driver = Driver(num_blocks=20)
    driver.ask(1, prompt=prompt, output=output)
    event = driver.final(1)
    assert event.finish is FinishReason.REJECTED
    assert event.error is not None
    assert event.error.code == code
    assert all(number in event.error.message for number in numbers)
    assert not driver.engine.busy


def test_without_chunked_prefill_a_prompt_must_fit_a_step() -> None:
    driver = Driver(EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=100))
    driver.ask(1, prompt=90, output=50)
    error = driver.final(1).error
    assert error is not None
    assert "140" in error.message
    assert "100" in error.message


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    driver = Driver(EngineConfig(max_num_seqs=1))
    driver.ask(1, output=100, deadline_s=0.55)
    driver.ask(2, output=100, deadline_s=0.35)
    driver.steps()
    assert driver.final(1).finish is driver.final(2).finish is FinishReason.TIMEOUT
    assert len(driver.tokens(1)) == 6
    assert driver.tokens(2) == []
    assert driver.engine.scheduler.pool.available == 64


def test_a_faulty_row_fails_alone() -> None:
    driver = Driver(fault=lambda rid, index: "logits are not finite" if (rid, index) == (2, 1) else None)
    requests = [driver.ask(rid) for rid in (1, 2, 3)]
    driver.steps()
    assert driver.final(2).finish is FinishReason.FAILED
    assert driver.final(2).error is not None
    for request in (requests[0], requests[2]):
        assert driver.tokens(request.rid) == expected_tokens(request, driver.info)
    check(driver.engine.scheduler)


def test_nobody_builds_on_the_blocks_of_a_faulty_request() -> None:
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=4)
    driver = Driver(config, fault=lambda rid, index: "NaN" if rid == 1 else None)
    driver.ask(1, prompt=100)  # two chunks: the first is published before the fault is seen
    driver.steps()
    driver.ask(2, prompt=100)
    driver.steps()
    assert driver.final(1).finish is FinishReason.FAILED
    assert driver.final(2).cached_tokens == 0


def test_cancel_is_idempotent_in_every_state() -> None:
    driver = Driver(EngineConfig(max_num_seqs=1))
    driver.ask(1, output=50)
    driver.ask(2, output=50)
    driver.send(Cancel(2), Cancel(2), Cancel(99))
    driver.steps(3)
    driver.send(Cancel(1, stop=True), Cancel(1))
    driver.steps()
    assert driver.final(1).finish is FinishReason.STOP
    assert driver.final(2).finish is FinishReason.CANCELLED
    assert driver.engine.scheduler.pool.available == 64


def test_draining_finishes_what_is_there_and_refuses_newcomers() -> None:
    driver = Driver()
    driver.ask(1)
    driver.send(Drain())
    driver.ask(2)
    driver.steps()
    assert driver.final(1).finish is FinishReason.LENGTH
    assert driver.final(2).error is not None
    assert driver.final(2).error.code == "RW-DRAIN"


@pytest.mark.parametrize(
    ("config", "slots", "blocks", "holder"),
    [
        (EngineConfig(), 1, 64, "seats"),
        (EngineConfig(), 4, 20, "kv-blocks"),
        (EngineConfig(batching="static"), 4, 64, "static-batch"),
    ],
)
def test_why_names_the_limit_that_holds_the_first_in_line(
    config: EngineConfig, slots: int, blocks: int, holder: str
) -> None:
    driver = Driver(config, max_slots=slots, num_blocks=blocks)
    driver.ask(1, prompt=200, output=50)
    driver.steps(2)
    for rid in (2, 3):
        request = GenerateRequest(rid=rid, tokens=[9] * 200, sampling=SamplingParams(max_tokens=4))
        driver.send(Submit(request))
    reports = driver.send(Explain(token=7))
    assert isinstance(reports[0], Explained)
    first, second = reports[0].reasons
    assert (first.rid, first.position, first.holder) == (2, 0, holder)
    # Nobody of another batch may board, whoever stands before him.
    assert (second.rid, second.position, second.holder) == (3, 1, holder if holder == "static-batch" else "priority")
    driver.steps()
    assert driver.final(2).finish is driver.final(3).finish is FinishReason.LENGTH


def test_a_second_request_reuses_the_prefix_of_the_first() -> None:
    driver = Driver()
    driver.ask(1, prompt=100)
    driver.steps()
    driver.ask(2, prompt=100)
    driver.ask(3, prompt=100, salt="other")
    driver.steps()
    assert [driver.final(rid).usage.cached_tokens for rid in (1, 2, 3)] == [0, 96, 0]  # type: ignore[union-attr]


def test_priority_boards_the_urgent_first_and_the_patient_in_the_end() -> None:
    config = EngineConfig(max_num_seqs=1, scheduling_policy="priority", promote_after=1.0)
    driver = Driver(config)
    driver.ask(1, output=20)
    driver.ask(2, output=20, priority=5)
    for rid in range(3, 13):
        driver.ask(rid, output=20, priority=0)
        driver.steps(20)
    driver.steps()
    ends = [event.rid for event in driver.events if event.finish is not None]
    assert ends[0] == 1
    assert ends.index(3) < ends.index(2) < len(ends) - 1


@pytest.mark.parametrize(
    ("config", "blocks", "holder"),
    [
        (EngineConfig(scheduling_policy="fcfs"), 64, "seats"),
        (EngineConfig(scheduling_policy="fcfs"), 13, "kv-blocks"),
        (EngineConfig(batching="static", scheduling_policy="fcfs"), 64, "static-batch"),
    ],
)
def test_who_waits_is_told_how_long_and_how_good_such_estimates_were(
    config: EngineConfig, blocks: int, holder: str
) -> None:
    """Answers of 40 steps of 0.1 s, two at a time (by seats, or by memory): the third boards in 4 s, the fifth in 8."""
    driver = Driver(config, max_slots=8 if holder == "kv-blocks" else 2, num_blocks=blocks)

    def burst(rids: range) -> list[Why]:
        for rid in rids:
            driver.ask(rid, prompt=50, output=40, salt=str(rid))
        driver.steps(2)
        (report,) = driver.send(Explain(token=1))
        driver.steps()
        return report.reasons  # type: ignore[no-any-return]

    burst(range(1, 5))  # what answers are like is learned from these
    waiting = burst(range(11, 17))
    assert [(why.rid, why.position) for why in waiting] == [(13, 0), (14, 1), (15, 2), (16, 3)]
    assert waiting[0].holder == holder
    for why, boards in zip(waiting, (4, 4, 8, 8), strict=True):
        usage = driver.final(why.rid).usage
        assert usage is not None
        assert usage.first_scheduled_s == pytest.approx(boards, abs=0.3)
        assert why.eta_s == pytest.approx(boards, rel=0.2)
    error = burst(range(21, 31))[0].eta_error
    assert error is not None
    assert error < 0.3
