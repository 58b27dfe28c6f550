"""A text service without a model: it answers with what it was asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

from ropeway.contract import (
    EngineStats,
    ExecutorInfo,
    FinishReason,
    Ordered,
    Pinned,
    Pooling,
    SamplingParams,
    TokenLogprob,
    Usage,
    Why,
)
from ropeway.contract.channel import LinkState
from ropeway.contract.scene import Life, Scene
from ropeway.errors import (
    ConfigError,
    DeadlineError,
    DrainingError,
    EngineError,
    RequestError,
    RopewayError,
    TemplateError,
)
from ropeway.service.context import check_context, check_input, check_purpose, reserve
from ropeway.service.encoder import cut
from ropeway.service.params import check_tokens, validate, with_max_tokens
from ropeway.service.request import TextChunk, TextRequest, TextStream
from ropeway.service.stream import AnswerStream
from ropeway.text.dialect import Dialect
from ropeway.text.output import OutputText, Piece
from ropeway.text.stopper import StopAutomaton
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer, PairLimits, Tokenizer

_COUNTS = Pooling("mean", 32)


class _Echo:
    """One answer: what it is made of, and what it has cost."""

    def __init__(self, request: TextRequest, tokens: list[int], output: OutputText, max_tokens: int) -> None:
        self.request = request
        self.tokens = tokens
        self.output = output
        self.max_tokens = max_tokens
        self.first: float | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def chunk(self, piece: Piece) -> TextChunk:
        count = self.request.sampling.logprobs
        rated = [] if count is None else [_rated(token, count) for token in piece.tokens]
        return TextChunk(text=piece.text, tokens=piece.tokens, logprobs=rated)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.tokens),
            completion_tokens=self.output.count,
            cached_tokens=0,
            preemptions=0,
            first_scheduled_s=0.0,
            first_token_s=self.first,
            total_s=self.seconds,
        )


class EchoService:
    """A `TextService` that returns the prompt's text token by token, for working on clients and on the HTTP floor.

    A conversation is rendered by `template`; without one, the last message's content is the prompt. `dialect` is how
    what is echoed is to be read. `delay` is the time before each token in seconds. `failure` is asked before each token
    (with the request and the number of tokens sent) and may return an error that ends the answer. `max_tokens` cuts the
    echo as it would cut an answer.

    Number i of a `pooling` vector counts the tokens with the remainder i. A service that judges scores a pair by the
    share of the second text's tokens that the first one has too.
    """

    def __init__(
        self,
        *,
        model_name: str = "echo",
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        dialect: Dialect | None = None,
        max_model_len: int = 4096,
        delay: float = 0.0,
        failure: Callable[[TextRequest, int], RopewayError | None] | None = None,
        pooling: Pooling | None = _COUNTS,
    ) -> None:
        self.model_name = model_name
        self.default_priority = 0
        self.max_model_len = max_model_len
        self.state = LinkState.READY
        self.delay = delay
        self.failure = failure
        self.pooling = pooling
        self._tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.eos_ids: tuple[int, ...] = () if self._tokenizer.eos_id is None else (self._tokenizer.eos_id,)
        self._template = template
        self.dialect = dialect or Dialect(self._tokenizer)
        self._rids = itertools.count(1)
        self._live: dict[int, tuple[AnswerStream, asyncio.Task[None]]] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0

    @property
    def info(self) -> ExecutorInfo:
        return ExecutorInfo(
            model=self.model_name,
            device="none",
            dtype="none",
            num_blocks=0,
            block_size=16,
            max_slots=0,
            max_model_len=self.max_model_len,
            vocab_size=self._tokenizer.vocab_size,
            pooling=self.pooling,
            generates=self.pooling is None or not self.pooling.judges,
        )

    @property
    def sampling_defaults(self) -> SamplingParams:
        return SamplingParams()

    def reads(self, variable: str) -> bool:
        return self._template is not None and self._template.reads(variable)

    @property
    def stats(self) -> EngineStats | None:
        return EngineStats(
            step=self._steps,
            running=len(self._live),
            waiting=0,
            slots=0,
            blocks_total=0,
            blocks_used=0,
            blocks_cached=0,
            rows=len(self._live),
            step_tokens=0,
            step_seconds=self.delay,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            cache_queries=0,
            cache_hits=0,
            preemptions=0,
        )

    async def submit(self, request: TextRequest) -> TextStream:
        if self.state is LinkState.DRAINING:
            raise DrainingError("The server is shutting down. Send the request to another.", retry_after=1.0)
        if self.state is LinkState.DEAD:
            raise EngineError("The engine has stopped.")
        check_purpose(self.info, request.pooling)
        sampling = validate(request.sampling, vocab_size=self._tokenizer.vocab_size)
        tokens = await self.tokenize(request)
        if request.pooling:
            check_input(len(tokens), self.max_model_len)
        else:
            sampling = with_max_tokens(sampling, check_context(len(tokens), sampling.max_tokens, self.max_model_len))
        reserve(request, len(tokens))
        rid = next(self._rids)
        output = OutputText(
            self._tokenizer.decoder(
                sampling.skip_special_tokens, starts=request.messages is not None, shown=request.shown
            ),
            StopAutomaton.of(sampling.stop) if sampling.stop else None,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )
        echo = _Echo(request, tokens, output, sampling.max_tokens)
        stream = AnswerStream(
            request.request_id, tokens, rid=rid, account=echo.usage, on_cancel=lambda: self._cancel(rid)
        )
        self._prompt_tokens += len(tokens)
        task = asyncio.create_task(self._serve(stream, echo))
        self._live[rid] = stream, task
        stream.accept()
        return stream

    async def tokenize(self, request: TextRequest) -> list[int]:
        most = self.max_model_len if request.truncate == -1 else request.truncate
        if request.tokens is not None:
            tokens = check_tokens(request.tokens, self._tokenizer.vocab_size)
            return tokens if most is None else cut(tokens, tokens, most, left=request.truncate_left)
        text = request.text
        if request.messages is not None:
            if self._template is not None:
                text = await self._template.render_async(
                    request.messages,
                    add_generation_prompt=request.add_generation_prompt,
                    continue_final_message=request.continue_final_message,
                    variables=request.template_kwargs,
                )
            elif request.messages:
                text = str(request.messages[-1].get("content") or "")
            else:
                raise TemplateError("The conversation is empty. Send at least one message.", param="messages")
        tokens = self._tokenizer.encode(text or "", bool(request.add_special_tokens))
        if most is None:
            return tokens
        return cut(tokens, self._tokenizer.encode(text or "", False), most, left=request.truncate_left)

    async def join(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        return self._tokenizer.encode_pair(first, second, most, limits)

    async def detokenize(
        self,
        tokens: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        starts: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        decoder = self._tokenizer.decoder(skip_special_tokens, starts=starts, shown=shown)
        return decoder.push(check_tokens(tokens, self._tokenizer.vocab_size, param="tokens")) + decoder.flush()

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        return [self._tokenizer.token_string(token) for token in tokens]

    async def why(self, *rids: int) -> list[Why]:
        """Nothing ever waits here."""
        return []

    async def look(self, since: int = 0) -> Scene | None:
        """There is no engine to see."""
        return None

    async def recall(self, *rids: int) -> list[Life]:
        return []

    async def reorder(self, policy: str = "") -> Ordered:
        if policy:
            raise ConfigError("Nothing ever waits in this service, so no order can be chosen.", param="policy")
        return Ordered(0, "fcfs", 0)

    async def pin(self, name: str = "", request: TextRequest | None = None) -> list[Pinned]:
        if name:
            raise RequestError("Nothing is cached in this service, so no prefix can be pinned.", param="name")
        return []

    def drain(self) -> None:
        self.state = LinkState.DRAINING

    def die(self, error: RopewayError | None = None) -> None:
        """Behave as if the engine had died: every open stream fails, and newcomers are refused."""
        self.state = LinkState.DEAD
        for rid, (stream, _) in list(self._live.items()):
            stream.fail(error or EngineError("The engine stopped unexpectedly. See the server's log."))
            self._cancel(rid)

    def _cancel(self, rid: int) -> None:
        if rid in self._live:
            self._live.pop(rid)[1].cancel()

    async def _serve(self, stream: AnswerStream, echo: _Echo) -> None:
        try:
            await self._answer(stream, echo)
        finally:
            self._live.pop(stream.rid, None)

    async def _answer(self, stream: AnswerStream, echo: _Echo) -> None:
        request, output = echo.request, echo.output
        if request.sampling.prompt_logprobs is not None:
            count = request.sampling.prompt_logprobs
            stream.feed(TextChunk(prompt_logprobs=[_rated(token, count) for token in echo.tokens[1:]]))
        for sent, token in enumerate(echo.tokens[: echo.max_tokens]):
            await asyncio.sleep(self.delay)
            error = self.failure(request, sent) if self.failure is not None else None
            if request.deadline_s is not None and echo.seconds > request.deadline_s:
                error = DeadlineError(f"The request took longer than its deadline of {request.deadline_s} s.")
            if error is not None:
                stream.fail(error)
                return
            self._steps += 1
            self._generation_tokens += 1
            echo.first = echo.seconds if echo.first is None else echo.first
            piece = output.push((token,))
            stream.feed(echo.chunk(piece))
            if piece.stop is not None:
                stream.feed(TextChunk(finish=FinishReason.STOP, stop_reason=piece.stop, usage=echo.usage()))
                return
        piece = output.finish()
        finish = FinishReason.LENGTH if len(echo.tokens) > echo.max_tokens and piece.stop is None else FinishReason.STOP
        vector = self._vector(request, echo.tokens) if request.pooling else b""
        stream.feed(
            replace(echo.chunk(piece), finish=finish, stop_reason=piece.stop, usage=echo.usage(), vector=vector)
        )

    def _vector(self, request: TextRequest, tokens: list[int]) -> bytes:
        assert self.pooling is not None, "check_purpose() has looked"
        if self.pooling.judges:
            first, second = tokens[: request.second], tokens[request.second :]
            return array("f", [sum(token in first for token in second) / max(len(second), 1)]).tobytes()
        counts = array("f", bytes(4 * self.pooling.size))
        for token in tokens:
            counts[token % self.pooling.size] += 1.0
        return counts.tobytes()


def _rated(token: int, count: int) -> TokenLogprob:
    """As if the tokens of each eight were alike, the lowest id the likeliest."""
    first = token // 8 * 8
    return TokenLogprob(
        token,
        -float(token - first),
        1 + token - first,
        [(first + i) % 256 for i in range(count)],
        [-float(i) for i in range(count)],
    )
