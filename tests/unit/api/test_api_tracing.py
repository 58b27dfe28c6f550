"""What traces tell of requests, and what becomes of it in trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from ropeway.api import tracing
from ropeway.api.registry import Registry, Tracked
from ropeway.api.tracing import Tracing
from ropeway.contract import SamplingParams
from ropeway.contract.scene import Life
from ropeway.errors import EngineError
from ropeway.observe.otlp import Span
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest
from waiting import eventually


class Sink:
    """Keeps what it gets; `broken` is what it raises, so long as it is set."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.broken: Exception | None = None
        self.closed = False

    async def send(self, spans: Sequence[Span]) -> None:
        if self.broken is not None:
            raise self.broken
        self.spans += spans

    async def close(self) -> None:
        self.closed = True

    @property
    def told(self) -> list[Any]:
        return [span.attributes["ropeway.request.id"] for span in self.spans]


async def answered(service: EchoService, name: str, count: int = 1, **sampling: Any) -> Tracked:
    """A request that has had its answer."""
    tracked = Registry(service).track(name)
    with tracked:
        for _ in range(count):
            request = TextRequest(request_id=name, text="abc", sampling=SamplingParams(max_tokens=3, **sampling))
            async for _ in await tracked.submit(request):
                pass
    tracked.end()
    return tracked


async def attributes(count: int = 1, **sampling: Any) -> dict[str, Any]:
    sink = Sink()
    one = Tracing(sink, every=0.0)
    one.ended(await answered(EchoService(), "r", count, **sampling))
    await eventually(lambda: sink.spans)
    await one.close()
    assert sink.closed
    return {name.removeprefix("gen_ai.request."): value for name, value in sink.spans[0].attributes.items()}


async def test_what_was_asked_for_is_told_and_what_was_not_is_left_out() -> None:
    plain = await attributes()
    assert plain["max_tokens"] == 3
    assert not {"choice.count", "top_k", "presence_penalty", "frequency_penalty", "seed"} & plain.keys()
    asked: dict[str, Any] = {"top_k": 5, "presence_penalty": 0.5, "frequency_penalty": -1.0, "seed": 7}
    found = await attributes(2, **asked)
    assert {name: found[name] for name in asked} == asked
    assert found["choice.count"] == 2


async def test_a_sink_that_fails_loses_its_spans_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    sink, service = Sink(), EchoService()
    one = Tracing(sink, every=0.0)
    sink.broken = ZeroDivisionError("a fault")
    one.ended(await answered(service, "first"))
    await eventually(lambda: "spans could not be made" in caplog.text)
    sink.broken = None
    one.ended(await answered(service, "second"))
    await eventually(lambda: sink.told)
    await one.close()
    assert sink.told == ["second"]


async def test_the_end_of_the_server_does_not_wait_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST", 2)
    sink, service = Sink(), EchoService()
    one = Tracing(sink, every=3600.0)
    for number in range(5):
        one.ended(await answered(service, str(number)))
    await asyncio.sleep(0)
    assert sink.told == []
    await one.close()
    assert sink.told == ["0", "1", "2", "3", "4"]


async def test_so_many_wait_to_be_told_of_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "QUEUE", 3)
    sink, service = Sink(), EchoService()
    one = Tracing(sink, every=3600.0)
    for number in range(5):
        one.ended(await answered(service, str(number)))
    await one.close()
    assert (sink.told, one.lost) == (["0", "1", "2"], 2)


@pytest.mark.parametrize("how", ["dead", "hangs"])
async def test_an_engine_that_has_died_takes_the_lives_of_its_requests_along(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(EchoService):
        async def recall(self, *rids: int) -> list[Life]:
            if how == "dead":
                raise EngineError("The engine is gone.")
            await asyncio.sleep(3600)
            return []

    monkeypatch.setattr(tracing, "_PATIENCE", 0.01)
    sink = Sink()
    one = Tracing(sink, every=0.0)
    one.ended(await answered(Gone(), "r"))
    await eventually(lambda: sink.spans)
    await one.close()
    [span] = sink.spans
    assert (span.name, span.attributes["gen_ai.usage.output_tokens"]) == ("text_completion echo", 3)
