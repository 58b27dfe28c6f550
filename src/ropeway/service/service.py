"""Text in, text out, over an engine that knows only tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ropeway.contract import (
    Cancel,
    Drain,
    EngineStats,
    ErrorInfo,
    ExecutorInfo,
    Explain,
    Explained,
    GenerateRequest,
    Ordered,
    Pin,
    Pinned,
    Pins,
    Ready,
    Reorder,
    Report,
    SamplingParams,
    Step,
    Stopped,
    Submit,
    TokenEvent,
    Why,
)
from ropeway.contract.channel import EngineLink, LinkState
from ropeway.contract.scene import Life, Look, Recall, Recalled, Scene
from ropeway.errors import DrainingError, EngineError, NotReadyError, RopewayError
from ropeway.service.context import check_context, check_input, check_purpose, reserve
from ropeway.service.decoding import AnswerDecoder
from ropeway.service.encoder import Encoder
from ropeway.service.grammars import Grammars
from ropeway.service.loader import ModelText
from ropeway.service.params import MAX_LOGPROBS, check_tokens, validate, with_bad_words, with_max_tokens
from ropeway.service.request import TextRequest, TextStream
from ropeway.service.stream import AnswerStream
from ropeway.text.dialect import Dialect
from ropeway.text.tokenizer import PairLimits

_log = logging.getLogger(__name__)
_LOST = EngineError("The engine stopped before this request was finished. Please send it again.")
_RETRY_AFTER = 5.0


class _Live:
    """A request that the engine has and that is not over for its reader."""

    __slots__ = ("decoder", "stream")

    def __init__(self, stream: AnswerStream, decoder: AnswerDecoder) -> None:
        self.stream = stream
        self.decoder = decoder


class EngineTextService:
    """The `TextService` over an engine. Lives on one event loop, like its link.

    `seed` starts the draws for requests that bring no seed of their own. `clock` gives seconds that never go back.
    """

    def __init__(
        self,
        link: EngineLink,
        text: ModelText,
        *,
        model_name: str | None = None,
        seed: int = 0,
        default_priority: int = 0,
        max_logprobs: int = MAX_LOGPROBS,
        threads: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_name = model_name or text.name
        self._link = link
        self._text = text
        self._encoder = Encoder(text.tokenizer, text.template, threads=threads)
        self._grammars = Grammars(text.tokenizer, text.eos_ids)
        self.default_priority = default_priority
        self._max_logprobs = max_logprobs
        self._clock = clock
        self._seeds = random.Random(seed)
        self._numbers = itertools.count(1)
        self._live: dict[int, _Live] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}  # by token
        self._pins: dict[str, Pin] = {}
        self._stats: EngineStats | None = None
        self._draining = False
        link.subscribe(self._on_report)
        if text.template is not None:
            text.template.warm()

    @property
    def state(self) -> LinkState:
        if self._draining and self._link.state is not LinkState.DEAD:
            return LinkState.DRAINING
        return self._link.state

    @property
    def info(self) -> ExecutorInfo | None:
        return self._link.info

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    @property
    def max_model_len(self) -> int:
        info = self._link.info
        return info.max_model_len if info is not None else self._text.context_limit

    @property
    def sampling_defaults(self) -> SamplingParams:
        return self._text.sampling_defaults

    @property
    def dialect(self) -> Dialect:
        return self._text.dialect

    def reads(self, variable: str) -> bool:
        return self._text.template is not None and self._text.template.reads(variable)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._text.eos_ids

    @property
    def open_streams(self) -> int:
        """Requests whose answers are not over."""
        return len(self._live)

    async def submit(self, request: TextRequest) -> TextStream:
        """`sampling.max_tokens` may be `params.FIT` for as many tokens as the context has room for."""
        info = self._check_state()
        check_purpose(info, request.pooling)
        sampling = validate(request.sampling, vocab_size=info.vocab_size, max_logprobs=self._max_logprobs)
        sampling = with_bad_words(sampling, self._text.tokenizer.encode)
        tokens = await self._encoder.encode(request, info.max_model_len)
        if request.pooling:
            check_input(len(tokens), info.max_model_len)
        else:
            sampling = with_max_tokens(sampling, check_context(len(tokens), sampling.max_tokens, info.max_model_len))
        tokens = check_tokens(tokens, info.vocab_size)
        if request.grammar is not None:
            sampling = msgspec.structs.replace(sampling, grammar=request.grammar(tokens))
        sampling = await self._grammars.check(sampling)
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=self._seeds.getrandbits(63))
        self._check_state()  # the engine may have gone while the prompt was being tokenized
        reserve(request, len(tokens))
        rid = next(self._numbers)
        decoder = AnswerDecoder(
            self._text.tokenizer,
            sampling,
            len(tokens),
            starts=request.messages is not None and not request.continue_final_message and not sampling.grammar,
            shown=request.shown,
            started=self._clock(),
        )
        stream = AnswerStream(
            request.request_id,
            tokens,
            rid=rid,
            account=lambda: decoder.usage(self._clock()),
            on_cancel=lambda: self._give_up(rid),
        )
        generate = GenerateRequest(
            rid=rid,
            tokens=tokens,
            sampling=sampling,
            eos_ids=() if sampling.ignore_eos and not sampling.grammar else self._text.eos_ids,
            priority=self.default_priority if request.priority is None else request.priority,
            tenant=request.tenant,
            salt=cache_salt(request.tenant, request.salt),
            deadline_s=request.deadline_s,
            ttft_deadline_s=request.ttft_deadline_s,
            cache=request.cache and sampling.prompt_logprobs is None,  # what is cached is not computed
            pooling=request.pooling,
            second=request.second,
            urgency=request.urgency,
        )
        self._live[rid] = _Live(stream, decoder)
        try:
            self._link.send(Submit(generate))
            await stream.accepted()
        except BaseException:
            stream.cancel()
            raise
        return stream

    async def tokenize(self, request: TextRequest) -> list[int]:
        return await self._encoder.encode(request, self.max_model_len if request.truncate is not None else None)

    async def join(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        return await self._encoder.join(first, second, most, limits)

    async def detokenize(
        self,
        tokens: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        starts: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        tokens = check_tokens(tokens, self._vocab_size, param="tokens")
        return await self._encoder.decode(tokens, skip_special_tokens, starts=starts, shown=shown)

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        return [self._text.tokenizer.token_string(token) for token in tokens]

    async def why(self, *rids: int) -> list[Why]:
        """See `TextService`. Raises NotReadyError or EngineError if the engine cannot say."""
        answer: Explained = await self._ask(Explain(next(self._numbers), list(rids)))
        return answer.reasons

    async def look(self, since: int = 0) -> Scene | None:
        """See `TextService`."""
        scene: Scene = await self._ask(Look(next(self._numbers), since))
        return scene

    async def recall(self, *rids: int) -> list[Life]:
        """See `TextService`."""
        answer: Recalled = await self._ask(Recall(next(self._numbers), list(rids)))
        return answer.lives

    async def reorder(self, policy: str = "") -> Ordered:
        """See `TextService`. An engine that is started again begins with the configured policy."""
        answer: Ordered = await self._ask(Reorder(next(self._numbers), policy))
        if answer.error is not None:
            raise answer.error.error()
        return answer

    async def pin(self, name: str = "", request: TextRequest | None = None) -> list[Pinned]:
        """See `TextService`. An engine that is started again hears of all pins, and caches them when they are used."""
        if request is None:
            answer: Pins = await self._ask(Pin(next(self._numbers), name))
            self._pins.pop(name, None)
        else:
            info = self._check_state()
            tokens = check_tokens(await self._encoder.encode(request, info.max_model_len), info.vocab_size)
            check_context(len(tokens), 1, info.max_model_len)
            pin = Pin(next(self._numbers), name, tokens, cache_salt(request.tenant, request.salt))
            answer = await self._ask(pin)
            if answer.error is None:
                self._pins[name] = pin
                one = SamplingParams(temperature=0.0, max_tokens=1)
                compute = dataclasses.replace(request, text=None, messages=None, tokens=tokens, sampling=one)
                async for _ in await self.submit(compute):
                    pass
                answer = await self._ask(Pin(next(self._numbers)))
        if answer.error is not None:
            raise answer.error.error()
        return answer.pins

    def drain(self) -> None:
        if not self._draining:
            self._draining = True
            with contextlib.suppress(RopewayError):  # an engine that is not ready has nothing to finish
                self._link.send(Drain())

    def close(self) -> None:
        """End what is still open and the helpers (threads, template worker). The link is its owner's to close."""
        self._fail_all(EngineError("The server has stopped before this request was finished. Please send it again."))
        self._encoder.close()
        self._grammars.close()

    @property
    def _vocab_size(self) -> int:
        info = self._link.info
        return info.vocab_size if info is not None else self._text.tokenizer.vocab_size

    def _check_state(self) -> ExecutorInfo:
        state, info = self.state, self._link.info
        if state is LinkState.DRAINING:
            raise DrainingError("The server is shutting down. Send the request to another.", retry_after=_RETRY_AFTER)
        if state is LinkState.DEAD:
            raise EngineError("The engine has failed and will not come back. See the server's log.")
        if state is LinkState.STARTING or info is None:
            raise NotReadyError("The engine is starting. Retry shortly.", retry_after=_RETRY_AFTER)
        return info

    async def _ask(self, command: Explain | Reorder | Pin | Look | Recall) -> Any:
        """Send a question and wait for the report with its token."""
        answer = asyncio.get_running_loop().create_future()
        self._link.send(command)
        self._questions[command.token] = answer
        try:
            return await answer
        finally:
            self._questions.pop(command.token, None)

    # The engine's news

    def _on_report(self, report: Report) -> None:
        match report:
            case Step(events, stats):
                self._stats = stats
                now = self._clock()
                for event in events:
                    live = self._live.get(event.rid)
                    if live is not None:  # otherwise it was cancelled or stopped here, and this is late
                        self._on_event(live, event, now)
            case (
                Explained(token=token)
                | Ordered(token=token)
                | Pins(token=token)
                | Scene(token=token)
                | Recalled(token=token)
            ):
                question = self._questions.get(token)
                if question is not None and not question.done():
                    question.set_result(report)
            case Ready():
                self._fail_all(_LOST)  # a new engine knows nothing of the old one's requests
                for pin in self._pins.values():
                    self._link.send(pin)
            case Stopped(error):
                self._fail_all(error.error() if error is not None else _LOST)

    def _on_event(self, live: _Live, event: TokenEvent, now: float) -> None:
        stream = live.stream
        try:
            chunk = live.decoder.take(event, now)
        except RopewayError as error:
            self._live.pop(event.rid, None)
            stream.fail(error)
            return
        except Exception:
            # Whatever is wrong with one answer's text must not reach the others.
            _log.exception("request %s: decoding failed", stream.request_id)
            self._give_up(event.rid)
            stream.fail(EngineError("The answer could not be decoded. See the server's log."))
            return
        if event.accepted:
            stream.accept()
        stream.feed(chunk)
        if chunk.finish is None:
            return
        if event.finish is None:
            self._give_up(event.rid, stop=True)
        else:
            self._live.pop(event.rid, None)

    def _give_up(self, rid: int, *, stop: bool = False) -> None:
        """Forget a request here and end it in the engine. Its late news will be dropped."""
        if self._live.pop(rid, None) is not None:
            with contextlib.suppress(RopewayError):  # an engine that is gone has forgotten it already
                self._link.send(Cancel(rid, stop))

    def _fail_all(self, error: RopewayError) -> None:
        live, self._live = self._live, {}
        for request in live.values():
            # Each reader gets an exception of its own: one object raised in many tasks would mix their tracebacks.
            request.stream.fail(ErrorInfo.of(error).error())
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ErrorInfo.of(error).error())


def cache_salt(tenant: str, salt: str) -> str:
    """The prefix cache's salt: a tenant never shares with another one, and may split its own cache further. Empty for
    requests with neither, which share among themselves."""
    return f"{len(tenant)}:{tenant}{salt}" if tenant or salt else ""
