"""Beam search without a model: against the search of everything, and the same through a service and offline."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from servicekit import INFO, USAGE, ScriptedLink, make_service, make_text

from ropeway.config import EngineConfig
from ropeway.contract import Extra, FinishReason, SamplingParams, TokenEvent, TokenLogprob
from ropeway.engine.engine import Engine
from ropeway.errors import ContextLengthError, DeadlineError, NumericalError, RequestError
from ropeway.remote.host import ThreadLink
from ropeway.service.beam import Beam, Search, beam_search
from ropeway.service.beam_offline import BeamSearchParams
from ropeway.service.echo import EchoService
from ropeway.service.llm import LLM
from ropeway.service.request import TextRequest
from ropeway.service.service import EngineTextService
from ropeway.sim.executor import FakeExecutor
from ropeway.text.tokenizer import ByteTokenizer
from waiting import eventually

EOS = 0


def logprobs(tokens: list[int], vocab: int, seed: int) -> list[float]:
    draw = random.Random(repr((seed, tokens)))
    weights = [draw.random() ** 3 + 1e-3 for _ in range(vocab)]
    return [math.log(weight / sum(weights)) for weight in weights]


def run(search: Search, vocab: int, seed: int) -> list[Beam]:
    while search.open:
        told = []
        for beam in search.open:
            values = logprobs(beam.tokens, vocab, seed)
            order = sorted(range(vocab), key=lambda token: -values[token])[: search.count]
            told.append(TokenLogprob(order[0], values[order[0]], 1, order, [values[token] for token in order]))
        search.advance(told)
    return search.results()


def everything(vocab: int, seed: int, most: int, least: int) -> list[tuple[float, list[int]]]:
    """All answers of up to `most` tokens with their log probabilities."""
    found, stack = [], [(0.0, list[int]())]
    while stack:
        total, tokens = stack.pop()
        if len(tokens) == most or tokens[-1:] == [EOS]:
            found.append((total, tokens))
            continue
        for token, value in enumerate(logprobs(tokens, vocab, seed)):
            if token != EOS or len(tokens) >= least:
                stack.append((total + value, [*tokens, token]))
    return found


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_beams_enough_for_everything_find_the_best(seed: int, least: int) -> None:
    """Without a length penalty nothing is given up too early, so a search that is wide enough is exact."""
    search = Search(4**4, 0.0, 4, ends=(EOS,), min_tokens=least)
    found = run(search, 4, seed)
    best = sorted(everything(4, seed, 4, least), key=lambda one: -one[0])
    assert [beam.tokens for beam in found[:5]] == [tokens for _, tokens in best[:5]]
    assert [beam.score for beam in found[:5]] == pytest.approx([total for total, _ in best[:5]])


def test_what_ends_an_answer_is_told_and_how_it_is_counted() -> None:
    def entry(*pairs: tuple[int, float]) -> TokenLogprob:
        return TokenLogprob(pairs[0][0], pairs[0][1], 1, [token for token, _ in pairs], [value for _, value in pairs])

    search = Search(2, 1.0, 3, ends=(EOS,), stops=(7,), keep=1)
    assert search.count == 4
    search.advance([entry((5, -0.1), (7, -0.5), (EOS, -0.6), (6, -2.0))])
    assert [beam.tokens for beam in search.open] == [[5], [6]]  # the end token was not among the best two
    search.advance([entry((EOS, -0.3), (5, -1.0)), entry((5, -1.0), (EOS, -1.1))])
    assert [(beam.tokens, beam.finish, beam.stop_reason, beam.score) for beam in search.results()] == [
        ([5, EOS], FinishReason.STOP, None, pytest.approx(-0.2)),
        ([7], FinishReason.STOP, 7, -0.5),
    ]
    # The best open beam, [5, 5], has -1.1 / 2, which is worse than both.
    assert not search.open
    assert search.results()[0].logprobs == [
        TokenLogprob(5, -0.1, 1, [5], [-0.1]),
        TokenLogprob(EOS, -0.3, 1, [EOS], [-0.3]),
    ]


@pytest.fixture
async def service() -> AsyncIterator[EngineTextService]:
    link = ThreadLink(Engine(FakeExecutor(INFO), EngineConfig(max_num_seqs=8)))
    made = EngineTextService(link, make_text())
    await link.start()
    try:
        yield made
    finally:
        made.close()
        await link.stop()


def request(text: str = "beams", **wishes: Any) -> TextRequest:
    return TextRequest(request_id="", text=text, sampling=SamplingParams(max_tokens=6, **wishes))


async def test_a_service_and_an_llm_find_the_same(service: EngineTextService) -> None:
    llm = LLM.over(FakeExecutor(INFO), make_text(), EngineConfig(max_num_seqs=8))
    for width in (1, 3):
        found = await beam_search(service, request(logprobs=2), width, 0.7)
        params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=0.7, logprobs=2)
        first, _ = llm.beam_search(["beams", "another prompt"], params)
        assert [beam.tokens for beam in found] == [output.token_ids for output in first.outputs]
        assert [beam.text for beam in found] == [output.text for output in first.outputs]
        assert [beam.cumulative_logprob for beam in found] == [output.cumulative_logprob for output in first.outputs]
        assert len(found) == width
        for beam, output in zip(found, first.outputs, strict=True):
            assert [one.token for one in beam.logprobs] == beam.tokens
            assert [next(iter(one)) for one in output.logprobs or ()] == beam.tokens
            assert beam.usage is not None
            assert (beam.usage.prompt_tokens, beam.usage.completion_tokens) == (6, len(beam.tokens))


@pytest.mark.parametrize(("wishes", "width", "param"), [
    ({"stop": ("x",)}, 2, "stop"), ({"logit_bias": {1: 1.0}}, 2, "logit_bias"), ({"bad_words": "x"}, 2, "bad_words"),
    ({}, 0, "best_of"), ({}, 10**6, "best_of"), ({}, 20, "best_of"), ({"grammar": "g"}, 2, "grammar"),
    ({"length_penalty": 11.0}, 2, "length_penalty"), ({"length_penalty": float("nan")}, 2, "length_penalty"),
])  # fmt: skip
async def test_what_beams_cannot_do_is_refused_by_name(
    service: EngineTextService, wishes: dict[str, Any], width: int, param: str
) -> None:
    penalty = wishes.pop("length_penalty", 1.0)
    with pytest.raises(RequestError) as caught:
        await beam_search(service, request(**wishes), width, penalty)
    assert caught.value.param == param


def test_beams_of_a_call_that_fails_are_not_computed_by_the_next() -> None:
    executor = FakeExecutor(INFO, fault=lambda rid, index: "NaN" if rid == 1 else None)
    llm = LLM.over(executor, make_text(), EngineConfig(max_num_seqs=8, max_num_batched_tokens=16))
    with pytest.raises(NumericalError, match="NaN"):
        llm.beam_search(["a", "b" * 190], BeamSearchParams(beam_width=2, max_tokens=4))
    before = executor.steps
    assert llm.generate("c", SamplingParams(max_tokens=2, seed=1, ignore_eos=True))[0].finished
    assert executor.steps - before <= 3
    assert llm._engine.scheduler.pool.used == 0


async def test_what_is_only_the_models_habit_is_left_out(service: EngineTextService) -> None:
    service._text.generation["repetition_penalty"] = 1.1  # type: ignore[index]
    assert service.sampling_defaults.repetition_penalty == 1.1
    plain = await beam_search(service, request(), 2, 1.0)
    assert [beam.tokens for beam in plain] == [
        beam.tokens for beam in await beam_search(service, request(repetition_penalty=1.1), 2, 1.0)
    ]
    with pytest.raises(RequestError, match="repetition_penalty"):
        await beam_search(service, request(repetition_penalty=1.2), 2, 1.0)


async def test_limits_of_context_and_time_hold(service: EngineTextService) -> None:
    with pytest.raises(ContextLengthError):
        await beam_search(service, request("x" * 198), 2, 1.0)
    late = TextRequest(request_id="", text="x", sampling=SamplingParams(max_tokens=50), deadline_s=1e-9)
    with pytest.raises(DeadlineError):
        await beam_search(service, late, 2, 1.0)


async def test_whoever_gives_up_takes_all_beams_along() -> None:
    link = ScriptedLink()
    service = make_service(link)
    try:
        task = asyncio.create_task(beam_search(service, request(), 2, 1.0))
        await eventually(lambda: len(link.requests) == 1)
        top = TokenLogprob(65, -0.5, 1, [65, 66, 67], [-0.5, -1.0, -2.0])
        link.news(first_token(link.requests[0].rid, top))
        await eventually(lambda: len(link.requests) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: len(link.cancels) == 2)
        assert {cancel.rid for cancel in link.cancels} == {request.rid for request in link.requests[1:]}
        assert service.open_streams == 0
    finally:
        service.close()


def first_token(rid: int, top: TokenLogprob) -> TokenEvent:
    return TokenEvent(rid, [top.token], finish=FinishReason.LENGTH, usage=USAGE, extra=Extra(rid, [top]))


async def test_any_text_service_will_do() -> None:
    found = await beam_search(EchoService(), request("abc"), 2, 1.0)
    assert len(found) == 2
    assert all(beam.finish is FinishReason.LENGTH for beam in found)
    assert all(beam.text == ByteTokenizer().decode(beam.tokens) for beam in found)
