"""The seam between the HTTP dialects and the text service: text in, text out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ropeway.contract import (
    EngineStats,
    ExecutorInfo,
    FinishReason,
    Ordered,
    Pinned,
    SamplingParams,
    TokenLogprob,
    Urgency,
    Usage,
    Why,
)
from ropeway.contract.channel import LinkState
from ropeway.contract.scene import Life, Scene
from ropeway.text.dialect import Dialect
from ropeway.text.tokenizer import PairLimits

ChatMessage = dict[str, Any]
"""One message of a conversation as the template sees it: role, content (text), and whatever else the client sent."""


class Meter(Protocol):
    """Counts what one answer takes of what its client may have."""

    def begin(self, model: str) -> None:
        """An answer of `model` is asked for. Raises RopewayError if the client may not have it."""

    def reserve(self, prompt: int, answer: int | None, longest: int | None = None) -> None:
        """One of its sequences is about to run, with so many tokens of prompt and at most so many of answer; None if
        as many as fit. The engine has not heard of it. For several sequences at once, `longest` is the longest prompt.
        Raises RopewayError if the client may not have so many."""

    def end(self, prompt: int, cached: int, answer: int) -> None:
        """The answer is over, however it ended. It took so many tokens of prompts, of which `cached` were in the prefix
        cache, and of answers; none at all if it was refused. Comes once after a `begin` that raised nothing."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One sequence to generate. Exactly one of `text`, `tokens`, `messages` is given.

    `request_id` is the client's name for it, used in logs only. Template arguments apply to `messages`.
    `add_special_tokens` applies to `text` and, by default off, to rendered messages. `truncate` cuts the prompt to so
    many tokens, at its end or, with `truncate_left`, at its beginning; -1 is as many as the model takes. Special tokens
    around a text stay. `cache`, `pooling`, `second` and `urgency` as in `GenerateRequest`. `trace` is the W3C
    traceparent that the request came with. `grammar` makes
    `sampling.grammar` of the prompt's tokens, where it depends on how the prompt ends. `shown` are special tokens that
    the text has although it skips special tokens. `meter`, if there is one, is shared by all sequences of an answer.
    """

    request_id: str
    sampling: SamplingParams
    text: str | None = None
    tokens: Sequence[int] | None = None
    messages: Sequence[ChatMessage] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    priority: int | None = None
    tenant: str = ""
    salt: str = ""
    deadline_s: float | None = None
    ttft_deadline_s: float | None = None
    truncate: int | None = None
    truncate_left: bool = False
    cache: bool = True
    pooling: str = ""
    second: int = 0
    urgency: Urgency = Urgency.HIGH
    meter: Meter | None = None
    trace: str = ""
    grammar: Callable[[Sequence[int]], str] | None = None
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """News of one request: whole characters only, stop strings already removed.

    `logprobs` has one entry for each of `tokens` if the request asked for them. `prompt_logprobs`, complete and one for
    each token of the prompt but the first, and `vector` come once, at the latest with the last chunk.
    `finish`, `usage` are set on the last chunk alone. `stop_reason` is the stop string or stop token id that ended
    it, None for the model's own end token. A failed request raises its error instead of yielding a last chunk.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    vector: bytes = b""
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None


class TextStream(Protocol):
    """One accepted request. Iterating yields chunks, the last with `finish`; a failure raises a RopewayError.
    Between two chunks the reader may be slow: deltas are merged, so memory stays bounded by the answer."""

    request_id: str
    prompt_tokens: Sequence[int]
    rid: int

    def __aiter__(self) -> AsyncIterator[TextChunk]: ...

    def account(self) -> Usage:
        """What it has cost so far, or in all once it is over. What only the engine knows (`preemptions`,
        `first_scheduled_s`) is missing until the engine has ended it."""

    def cancel(self) -> None:
        """Give up; idempotent, safe at any time, frees the seat within two steps."""


class TextService(Protocol):
    """What the API floor stands on."""

    @property
    def state(self) -> LinkState: ...

    @property
    def info(self) -> ExecutorInfo | None: ...

    @property
    def stats(self) -> EngineStats | None: ...

    @property
    def model_name(self) -> str: ...

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds where a request says nothing: the model's own settings."""

    @property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls of tools."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""

    @property
    def default_priority(self) -> int:
        """Of requests that name none."""

    @property
    def max_model_len(self) -> int: ...

    def reads(self, variable: str) -> bool:
        """Whether the chat template reads a variable of that name."""

    async def submit(self, request: TextRequest) -> TextStream:
        """Tokenize, check, send, and wait until the engine has accepted it. Raises RopewayError if it has not."""

    async def tokenize(self, request: TextRequest) -> list[int]: ...

    async def join(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        """A pair of texts as one prompt, and where the second one begins. See `Tokenizer.encode_pair`."""

    async def detokenize(
        self,
        tokens: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        starts: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        """A text at once. The arguments are those of `Tokenizer.decoder`."""

    def token_strings(self, tokens: Sequence[int]) -> list[str]: ...

    async def why(self, *rids: int) -> list[Why]:
        """What each of `rids` waits for, or that it runs; without any, all that wait. Unknown ones are left out."""

    async def look(self, since: int = 0) -> Scene | None:
        """What the engine looks like now, with what has happened after number `since`; None if there is nothing to see.
        Raises NotReadyError or EngineError if the engine cannot say."""

    async def recall(self, *rids: int) -> list[Life]:
        """The lives of these requests, those left out that are not remembered. Raises as `look` does."""

    async def reorder(self, policy: str = "") -> Ordered:
        """Let requests board by another scheduling policy from now on, or just say which it is. Raises ConfigError if
        there is no such policy."""

    async def pin(self, name: str = "", request: TextRequest | None = None) -> list[Pinned]:
        """Compute the prompt of `request` and keep it cached as `name`; without a request give `name` up; without a
        name change nothing. Returns all that is pinned. Raises RequestError if it cannot be."""

    def drain(self) -> None:
        """Refuse newcomers from now on; running requests finish."""
