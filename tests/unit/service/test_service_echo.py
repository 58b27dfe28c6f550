"""The echo service."""

from __future__ import annotations

import asyncio

import pytest

from ropeway.contract import FinishReason, SamplingParams
from ropeway.errors import ConfigError, ContextLengthError, DrainingError, EngineError, NumericalError, TemplateError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest
from ropeway.service.stream import collect


def ask(text: str = "héllo", **sampling: object) -> TextRequest:
    sampling.setdefault("max_tokens", 100)
    return TextRequest(request_id="r", text=text, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


async def test_it_says_what_it_was_asked_token_by_token() -> None:
    service = EchoService()
    stream = await service.submit(ask())
    chunks = [chunk async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["h", "é", "l", "l", "o"]
    assert chunks[-1].finish is FinishReason.STOP
    assert chunks[-1].usage.completion_tokens == 6
    assert service.stats.running == 0


async def test_max_tokens_and_stop_strings_cut_it() -> None:
    service = EchoService()
    short = await collect(await service.submit(ask(max_tokens=2)))
    assert (short.text, short.finish) == ("h\ufffd", FinishReason.LENGTH)
    stopped = await collect(await service.submit(ask(stop=("lo",))))
    assert (stopped.text, stopped.finish, stopped.stop_reason) == ("hél", FinishReason.STOP, "lo")
    chat = TextRequest(request_id="r", messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams())
    assert (await collect(await service.submit(chat))).text == "hi"
    with pytest.raises(ContextLengthError):
        await service.submit(ask("x" * 5000))


async def test_what_it_does_not_do_is_refused() -> None:
    service = EchoService()
    with pytest.raises(TemplateError, match="conversation is empty"):
        await service.submit(TextRequest(request_id="r", messages=[], sampling=SamplingParams()))
    with pytest.raises(ConfigError, match="no order can be chosen"):
        await service.reorder("sjf")
    assert (await service.reorder()).policy == "fcfs"


async def test_failures_death_cancel_and_drain() -> None:
    service = EchoService(failure=lambda request, sent: NumericalError("NaN") if sent == 2 else None)
    stream = await service.submit(ask())
    with pytest.raises(NumericalError):
        await collect(stream)
    service = EchoService(delay=60)
    streams = [await service.submit(ask()) for _ in range(3)]
    streams[0].cancel()
    assert (await collect(streams[0])).finish is FinishReason.CANCELLED
    assert service.stats.running == 2
    service.drain()
    with pytest.raises(DrainingError):
        await service.submit(ask())
    service.die()
    for stream in streams[1:]:
        with pytest.raises(EngineError):
            await collect(stream)
    await asyncio.sleep(0)
    assert service.stats.running == 0
