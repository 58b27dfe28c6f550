"""Log probabilities on their way from the engine to the reader: each stays with its token, a prompt's come once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from servicekit import INFO, USAGE, ScriptedLink, make_service, make_text

from blind import Blind
from ropeway.config import EngineConfig
from ropeway.contract import Extra, FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenLogprob
from ropeway.engine import engine
from ropeway.errors import RequestError
from ropeway.scheduler import Scheduler
from ropeway.service.decoding import AnswerDecoder
from ropeway.service.llm import LLM
from ropeway.service.request import TextChunk, TextRequest
from ropeway.service.stream import AnswerStream, collect
from ropeway.sim.executor import FakeExecutor, expected_logprobs
from ropeway.text.tokenizer import ByteTokenizer

TEXT = st.text(alphabet="aé世👩xyz ", max_size=25)


def entry(place: int, token: int) -> TokenLogprob:
    """One that can be told from all others."""
    return TokenLogprob(token, -float(place), 1 + place)


@settings(max_examples=300)
@given(data=st.data())
async def test_each_token_has_its_own_whatever_is_held_or_stopped(data: st.DataObject) -> None:
    """Multi-byte characters and stop strings hold tokens back; readers may be slow."""
    tokens = list(data.draw(TEXT).encode())
    stop = tuple(data.draw(st.lists(st.sampled_from(["x", "yx", "é", "世 ", "xyz"]), max_size=2)))
    prompt = data.draw(st.integers(1, 6))
    sampling = SamplingParams(logprobs=0, prompt_logprobs=0, stop=stop, max_tokens=100)
    decoder = AnswerDecoder(ByteTokenizer(), sampling, prompt, starts=True, started=0.0)
    stream = AnswerStream("", [], rid=1, account=lambda: USAGE)
    read: list[TextChunk] = []
    for event in news(data, tokens, prompt):
        chunk = decoder.take(event, 0.0)
        assert [one.token for one in chunk.logprobs] == chunk.tokens
        stream.feed(chunk)
        if data.draw(st.booleans()) and (chunk.text or chunk.tokens or chunk.prompt_logprobs) and chunk.finish is None:
            read.append(await anext(stream))
        if chunk.finish is not None:
            break
    rest = await collect(stream)
    told = [one for chunk in [*read, rest] for one in chunk.logprobs]
    assert told == [entry(place, token) for place, token in enumerate(tokens)][: len(told)]
    assert [one.token for one in told] == [token for chunk in [*read, rest] for token in chunk.tokens]
    if rest.stop_reason is None:
        assert len(told) == len(tokens)
    prompts = [chunk.prompt_logprobs for chunk in [*read, rest] if chunk.prompt_logprobs]
    assert prompts == [[entry(place, place) for place in range(1, prompt)]] * (prompt > 1)


def news(data: st.DataObject, tokens: list[int], prompt: int) -> Iterator[TokenEvent]:
    """The prompt in chunks, perhaps from the beginning again after a preemption; then tokens, some several at once."""
    starts = [data.draw(st.integers(1, prompt)), 1] if data.draw(st.booleans()) else [1]
    for number, begin in enumerate(reversed(starts)):
        end = prompt if number == len(starts) - 1 else begin
        at = 1
        while at < end:
            size = data.draw(st.integers(1, end - at))
            yield TokenEvent(1, extra=Extra(1, [], [entry(place, place) for place in range(at, at + size)], at))
            at += size
    place = 0
    while place < len(tokens):
        size = data.draw(st.integers(1, min(3, len(tokens) - place)))
        told = [entry(place + i, token) for i, token in enumerate(tokens[place : place + size])]
        yield TokenEvent(1, tokens[place : place + size], extra=Extra(1, told))
        place += size
    yield TokenEvent(1, finish=FinishReason.LENGTH, usage=USAGE)


async def test_the_prompts_log_probabilities_keep_a_request_out_of_the_cache_and_bad_words_become_tokens() -> None:
    link = ScriptedLink()
    service = make_service(link, max_logprobs=5)
    try:
        for wish in ({"prompt_logprobs": 0}, {"logprobs": 5}, {"bad_words": ("no",)}):
            await service.submit(TextRequest(request_id="", text="hi", sampling=SamplingParams(**wish)))
        assert [request.cache for request in link.requests] == [False, True, True]
        assert link.requests[2].sampling.bad_word_ids == (tuple(b"no"), tuple(b" no"))
        with pytest.raises(RequestError, match="from 0 to 5"):
            await service.submit(TextRequest(request_id="", text="hi", sampling=SamplingParams(logprobs=6)))
    finally:
        service.close()


def test_offline_answers_have_vllms_shape_under_preemption_too() -> None:
    """Of a fake executor that says what it must say of each token by the whole text before it."""
    info = replace(INFO, num_blocks=14)
    prompts = [[256, *b"the beginning of prompt number", 65 + number] for number in range(6)]
    sampling = SamplingParams(max_tokens=40, logprobs=3, prompt_logprobs=2, seed=4, ignore_eos=True)
    with patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())):
        llm = LLM.over(FakeExecutor(info), make_text(), EngineConfig(max_num_seqs=8, max_num_batched_tokens=16))
        results = llm.generate(prompts, sampling)
        assert llm._engine.scheduler.counters.preemptions > 0
    tokenizer = llm.get_tokenizer()
    for result in results:
        (output,) = result.outputs
        request = GenerateRequest(rid=0, tokens=result.prompt_token_ids, sampling=sampling)
        told = expected_logprobs(request, output.token_ids, INFO.vocab_size)
        assert output.logprobs is not None
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[0] is None
        for one, found in zip(told, [*result.prompt_logprobs[1:], *output.logprobs], strict=True):
            assert found is not None
            assert next(iter(found)) == one.token
            assert (found[one.token].logprob, found[one.token].rank) == (one.logprob, one.rank)
            assert found[one.token].decoded_token == tokenizer.token_bytes(one.token).decode(errors="replace")
            assert {token: found[token].logprob for token in one.top_ids} == dict(
                zip(one.top_ids, one.top, strict=True)
            )
            assert set(found) == {one.token, *one.top_ids}
        assert output.cumulative_logprob == pytest.approx(sum(one.logprob for one in told[-len(output.token_ids) :]))
    (plain,) = llm.generate(prompts[:1], SamplingParams(max_tokens=3))
    assert (plain.prompt_logprobs, plain.outputs[0].logprobs, plain.outputs[0].cumulative_logprob) == (None, None, None)


def test_several_answers_read_the_prompt_once() -> None:
    llm = LLM.over(FakeExecutor(INFO), make_text(), EngineConfig(max_num_seqs=8))
    (result,) = llm.generate("hello", SamplingParams(max_tokens=5, prompt_logprobs=1, ignore_eos=True), n=3)
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    assert [output.logprobs for output in result.outputs] == [None] * 3
