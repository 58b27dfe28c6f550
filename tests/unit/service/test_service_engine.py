"""`EngineTextService` over a scripted engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from servicekit import INFO, STATS, USAGE, ScriptedLink, make_service

from ropeway.contract import (
    Cancel,
    Drain,
    ErrorInfo,
    Explain,
    Explained,
    FinishReason,
    Pin,
    Pins,
    Ready,
    SamplingParams,
    Stopped,
    TokenEvent,
    Why,
)
from ropeway.contract.channel import LinkState
from ropeway.errors import (
    ContextLengthError,
    DeadlineError,
    DrainingError,
    EngineError,
    NotReadyError,
    NumericalError,
    OverloadedError,
    RequestError,
    TemplateError,
)
from ropeway.service.params import FIT
from ropeway.service.request import TextChunk, TextRequest, TextStream
from ropeway.service.service import cache_salt
from ropeway.service.stream import collect
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer
from waiting import eventually


def ask(text: str | None = "abc", **fields: Any) -> TextRequest:
    own = {*TextRequest.__annotations__} - {*SamplingParams.__annotations__}
    request = {key: fields.pop(key) for key in own & set(fields)}
    request.setdefault("add_special_tokens", False)
    fields.setdefault("max_tokens", 50)
    return TextRequest(request_id="r", text=text, sampling=SamplingParams(**fields), **request)


async def take(stream: TextStream) -> list[TextChunk]:
    return [chunk async for chunk in stream]


async def test_an_answer_goes_through_with_the_engines_usage() -> None:
    link = ScriptedLink()
    service = make_service(link)
    stream = await service.submit(ask(temperature=0.5, priority=3, tenant="t", deadline_s=9.0))
    [sent] = link.requests
    assert (sent.tokens, sent.eos_ids, sent.priority, sent.tenant) == (list(b"abc"), (257,), 3, "t")
    assert (sent.deadline_s, sent.sampling.temperature) == (9.0, 0.5)
    first = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0)
    link.text(sent.rid, "he")
    chunks = [await first]
    link.news(TokenEvent(sent.rid, [*b"y", 257], finish=FinishReason.STOP, usage=USAGE))
    chunks += await take(stream)
    assert [(c.text, c.tokens) for c in chunks] == [("he", list(b"he")), ("y", [*b"y", 257])]
    assert (chunks[-1].finish, chunks[-1].stop_reason, chunks[-1].usage) == (FinishReason.STOP, None, USAGE)
    assert service.stats == STATS
    assert service.open_streams == 0


async def test_requests_without_a_seed_get_different_ones_that_the_service_seed_fixes() -> None:
    drawn = []
    for _ in range(2):
        link = ScriptedLink()
        service = make_service(link, seed=7)
        for seed in (None, None, 5):
            await service.submit(ask(seed=seed))
        drawn.append([request.sampling.seed for request in link.requests])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    assert drawn[0][2] == 5


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_stream_at_once_and_tells_the_engine(include: bool) -> None:
    link = ScriptedLink()
    service = make_service(link)
    stream = await service.submit(ask(stop=("END",), include_stop_str_in_output=include))
    rid = link.requests[0].rid
    link.text(rid, "one E")
    link.text(rid, "N")
    link.text(rid, "D and more")
    answer = await collect(stream)
    assert answer.text == ("one END" if include else "one ")
    assert answer.tokens == list(b"one END")
    assert (answer.finish, answer.stop_reason) == (FinishReason.STOP, "END")
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (7, 3)
    assert link.cancels == [Cancel(rid, stop=True)]
    link.text(rid, "late", FinishReason.STOP)  # the engine's own end is no news any more
    assert link.cancels == [Cancel(rid, stop=True)]


async def test_a_stop_string_in_the_last_tokens_wins_over_the_length() -> None:
    link = ScriptedLink()
    stream = await make_service(link).submit(ask(stop=("END",)))
    link.text(link.requests[0].rid, "x END y", FinishReason.LENGTH)
    answer = await collect(stream)
    assert (answer.text, answer.finish, answer.stop_reason) == ("x ", FinishReason.STOP, "END")
    assert answer.usage.completion_tokens == 5
    assert link.cancels == []


async def test_held_text_and_half_characters_come_out_at_the_end() -> None:
    link = ScriptedLink()
    stream = await make_service(link).submit(ask(stop=("END",)))
    tokens = [*b"x EN", 0xC3]
    link.news(TokenEvent(link.requests[0].rid, tokens, finish=FinishReason.LENGTH, usage=USAGE))
    answer = await collect(stream)
    assert (answer.text, answer.tokens, answer.finish) == ("x EN\ufffd", tokens, FinishReason.LENGTH)


async def test_the_ending_token_has_no_text_even_if_it_is_an_ordinary_one() -> None:
    link = ScriptedLink()
    service = make_service(link)
    for include, text in ((False, "a"), (True, "aZ")):
        stream = await service.submit(ask(stop_token_ids=(90,), include_stop_str_in_output=include))
        link.text(link.requests[-1].rid, "aZ", FinishReason.STOP, stop_token=90)
        answer = await collect(stream)
        assert (answer.text, answer.tokens, answer.stop_reason) == (text, [97, 90], 90)


async def test_a_slow_reader_gets_everything_merged_into_one_chunk() -> None:
    link = ScriptedLink()
    stream = await make_service(link).submit(ask())
    for letter in "abcdef":
        link.text(link.requests[0].rid, letter)
    chunk = await anext(aiter(stream))
    assert (chunk.text, chunk.tokens) == ("abcdef", list(b"abcdef"))


async def test_every_turn_of_a_reader_lets_others_run() -> None:
    link = ScriptedLink()
    stream = await make_service(link).submit(ask())
    others = 0

    def other() -> None:
        nonlocal others
        others += 1
        asyncio.get_running_loop().call_soon(other)

    other()
    for turn in range(5):
        before = others
        link.text(link.requests[0].rid, "x")
        await anext(aiter(stream))
        assert others > before, turn
    stream.cancel()


async def test_cancel_reaches_the_engine_once_and_ends_the_reader() -> None:
    link = ScriptedLink()
    service = make_service(link)
    stream = await service.submit(ask())
    reader = asyncio.create_task(take(stream))
    await asyncio.sleep(0)
    stream.cancel()
    stream.cancel()
    assert [chunk.finish for chunk in await reader] == [FinishReason.CANCELLED]
    assert link.cancels == [Cancel(link.requests[0].rid)]
    link.text(link.requests[0].rid, "late", FinishReason.CANCELLED)
    assert service.open_streams == 0


async def test_a_caller_that_leaves_before_acceptance_cancels() -> None:
    link = ScriptedLink()
    link.accepts = False
    service = make_service(link)
    caller = asyncio.create_task(service.submit(ask()))
    await eventually(lambda: link.requests)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert link.cancels == [Cancel(link.requests[0].rid)]
    assert service.open_streams == 0


async def test_a_rejection_is_raised_by_submit() -> None:
    link = ScriptedLink()
    link.accepts = False
    service = make_service(link)
    caller = asyncio.create_task(service.submit(ask()))
    await eventually(lambda: link.requests)
    full = ErrorInfo.of(OverloadedError("full", retry_after=3.0))
    link.news(TokenEvent(link.requests[0].rid, finish=FinishReason.REJECTED, error=full))
    with pytest.raises(OverloadedError) as caught:
        await caller
    assert caught.value.retry_after == 3.0
    assert link.cancels == []


@pytest.mark.parametrize(
    ("finish", "error", "expected"),
    [
        (FinishReason.TIMEOUT, None, DeadlineError),
        (FinishReason.FAILED, ErrorInfo.of(NumericalError("NaN")), NumericalError),
        (FinishReason.CANCELLED, ErrorInfo.of(DrainingError("bye")), DrainingError),
    ],
)
async def test_a_failure_is_raised_after_the_text_before_it(
    finish: FinishReason, error: ErrorInfo | None, expected: type[Exception]
) -> None:
    link = ScriptedLink()
    stream = await make_service(link).submit(ask())
    rid = link.requests[0].rid
    link.text(rid, "so far")
    link.news(TokenEvent(rid, finish=finish, error=error, usage=USAGE))
    reader = aiter(stream)
    assert (await anext(reader)).text == "so far"
    with pytest.raises(expected):
        await anext(reader)
    with pytest.raises(StopAsyncIteration):
        await anext(reader)


async def test_engine_death_fails_every_stream_and_question_and_the_next_life_starts_clean() -> None:
    link = ScriptedLink()
    service = make_service(link)
    streams = [await service.submit(ask()) for _ in range(3)]
    readers = [asyncio.create_task(take(stream)) for stream in streams]
    question = asyncio.create_task(service.why())
    await asyncio.sleep(0)
    link.state = LinkState.STARTING
    link.report(Stopped(ErrorInfo.of(EngineError("killed by signal 9"))))
    outcomes = await asyncio.gather(*readers, question, return_exceptions=True)
    assert all(isinstance(outcome, EngineError) and "signal 9" in str(outcome) for outcome in outcomes)
    with pytest.raises(NotReadyError):
        await service.submit(ask())
    link.state = LinkState.READY
    link.report(Ready(INFO))
    stream = await service.submit(ask())
    rid = link.requests[-1].rid
    assert rid not in [request.rid for request in link.requests[:-1]]
    link.text(rid, "back", FinishReason.STOP, stop_token=107)
    assert (await collect(stream)).text == "bac"
    link.state = LinkState.DEAD
    with pytest.raises(EngineError):
        await service.submit(ask())


async def test_an_engine_that_is_started_again_hears_of_the_pins() -> None:
    link = ScriptedLink()
    service = make_service(link)
    pinning = asyncio.create_task(service.pin("manual", ask("x" * 40)))
    await eventually(lambda: bool(pins(link)))
    link.report(Pins(pins(link)[0].token, []))
    await eventually(lambda: bool(link.requests))
    link.text(link.requests[0].rid, "y", FinishReason.LENGTH)
    await eventually(lambda: len(pins(link)) == 2)
    link.report(Pins(pins(link)[1].token, []))
    assert await pinning == []
    link.sent.clear()
    link.report(Ready(INFO))
    assert [(pin.name, pin.tokens) for pin in pins(link)] == [("manual", list(b"x" * 40))]
    link.sent.clear()
    letting_go = asyncio.create_task(service.pin("manual"))
    await eventually(lambda: bool(pins(link)))
    link.report(Pins(pins(link)[0].token, []))
    await letting_go
    link.sent.clear()
    link.report(Ready(INFO))
    assert not pins(link)


def pins(link: ScriptedLink) -> list[Pin]:
    return [command for command in link.sent if isinstance(command, Pin)]


async def test_drain_refuses_newcomers_and_lets_the_others_finish() -> None:
    link = ScriptedLink()
    service = make_service(link)
    stream = await service.submit(ask())
    service.drain()
    service.drain()
    assert [command for command in link.sent if isinstance(command, Drain)] == [Drain()]
    assert service.state is LinkState.DRAINING
    with pytest.raises(DrainingError):
        await service.submit(ask())
    link.text(link.requests[0].rid, "done", FinishReason.LENGTH)
    assert (await collect(stream)).text == "done"


async def test_why_asks_the_engine() -> None:
    link = ScriptedLink()
    service = make_service(link)
    question = asyncio.create_task(service.why(4))
    await asyncio.sleep(0)
    [asked] = [command for command in link.sent if isinstance(command, Explain)]
    assert asked.rids == [4]
    reasons = [Why(4, "queued", 0, "slots", "all seats are taken")]
    link.report(Explained(asked.token + 1, []))
    link.report(Explained(asked.token, reasons))
    assert await question == reasons


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask(""), RequestError, "empty"),
        (ask(None, tokens=[]), RequestError, "empty"),
        (ask(None, tokens=[1, 258]), RequestError, "258"),
        (ask(None, tokens=[1, -1]), RequestError, "-1"),
        (ask(None, tokens=[1, True]), RequestError, "True"),
        (ask("x" * 200), ContextLengthError, "This model's maximum context length is 200 tokens."),
        (ask("x" * 190, max_tokens=11), ContextLengthError, "201 tokens (190 in the prompt, 11 for the answer)"),
        (ask("x" * 100_000), ContextLengthError, "This model's maximum context length is 200 tokens."),
        (ask(temperature=float("nan")), RequestError, "temperature"),
        (ask(stop_token_ids=(258,)), RequestError, "stop_token_ids"),
        (ask("\ud800"), RequestError, "surrogate"),
        (ask(pooling="mean"), RequestError, "scripted makes no vectors"),
        (ask(None, messages=[{"role": "user", "content": "x"}]), TemplateError, "--chat-template"),
    ],
)
async def test_what_can_never_work_is_refused_before_the_engine_hears_of_it(
    request_: TextRequest, error: type[Exception], message: str
) -> None:
    link = ScriptedLink()
    with pytest.raises(error) as caught:
        await make_service(link).submit(request_)
    assert message in str(caught.value)
    assert link.sent == []


async def test_as_many_tokens_as_fit() -> None:
    link = ScriptedLink()
    service = make_service(link)
    await service.submit(ask("x" * 150, max_tokens=FIT))
    await service.submit(ask("x" * 150, max_tokens=50))
    assert [request.sampling.max_tokens for request in link.requests] == [50, 50]


async def test_conversations_are_rendered_and_begin_a_text_of_their_own() -> None:
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}", {"bos_token": "B"})
    link = ScriptedLink()
    service = make_service(link, template=template)
    await service.submit(ask(None, messages=[{"role": "user", "content": "hé"}]))
    assert bytes(link.requests[0].tokens).decode() == "B<hé>"
    assert await service.tokenize(ask(None, messages=[{"role": "user", "content": "x"}])) == list(b"B<x>")
    service.close()


async def test_large_prompts_are_tokenized_off_the_loop() -> None:
    """The loop goes on while a tokenizer works that ends only once the loop has gone on."""
    running, proceed = threading.Event(), threading.Event()

    class Slow(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            running.set()
            if not proceed.wait(60):
                raise AssertionError("the event loop stood still")
            return [1]

    link = ScriptedLink()
    service = make_service(link, tokenizer=Slow())
    caller = asyncio.create_task(service.tokenize(ask("x" * 10_000)))
    await asyncio.to_thread(running.wait, 10)
    proceed.set()
    assert await caller == [1]
    service.close()


async def test_pairs_are_joined_as_the_tokenizer_joins_them_and_large_ones_off_the_loop() -> None:
    threads: set[int] = set()

    class Watched(ByteTokenizer):
        def encode_pair(self, *args: Any) -> tuple[list[int], int]:
            threads.add(threading.get_ident())
            return super().encode_pair(*args)

    service = make_service(ScriptedLink(), tokenizer=Watched())
    for second, own in (("answer", True), ("answer" * 2_000, False)):
        threads.clear()
        joined = await service.join("question", second, 50, (4, None))
        assert joined == ByteTokenizer().encode_pair("question", second, 50, (4, None))
        assert (threads == {threading.get_ident()}) == own
    service.close()


async def test_a_decoder_that_breaks_fails_its_own_request_only() -> None:
    class Broken(ByteTokenizer):
        def decoder(self, *args: Any, **kwargs: Any) -> Any:
            decoder = super().decoder(*args, **kwargs)
            if not link.requests:
                decoder.push = None  # type: ignore[method-assign, assignment]
            return decoder

    link = ScriptedLink()
    service = make_service(link, tokenizer=Broken())
    streams = [await service.submit(ask()) for _ in range(2)]
    first, second = (request.rid for request in link.requests)
    link.news(TokenEvent(first, [97]), TokenEvent(second, [98, 257], finish=FinishReason.STOP, usage=USAGE))
    with pytest.raises(EngineError, match="decoded"):
        await collect(streams[0])
    assert (await collect(streams[1])).text == "b"
    assert link.cancels == [Cancel(first)]


def test_tenants_never_share_a_salt() -> None:
    pairs = [("", ""), ("", "a"), ("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("1:a", "b"), ("1", ":ab")]
    assert len({cache_salt(*pair) for pair in pairs}) == len(pairs)
    assert cache_salt("", "") == ""


async def test_texts_and_tokens_by_the_way() -> None:
    service = make_service(ScriptedLink())
    assert await service.detokenize([*b"hi", 257]) == "hi<|end|>"
    assert service.token_strings([104, 257]) == ["h", "<|end|>"]
    with pytest.raises(RequestError):
        await service.detokenize([258])
    assert service.max_model_len == 200
