"""What is asked, and what comes of it: an answer or a failure for each item, in the order of the items."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, overload

from ropeway.errors import RequestError

Item: TypeAlias = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A message of the user; a list of messages; or a body with `messages` or `prompt`, any other field of a request, and
an `id` (or `custom_id`) if it has a name."""

Kind = Literal["timeout", "rate_limit", "authentication", "invalid_request", "overloaded", "server", "connection"]

_CHARS_PER_TOKEN: Final = 4
_LIKELY_ANSWER: Final = 256
"""Tokens of an answer whose length the request does not bound, until it is there."""


@dataclass(frozen=True)
class Asked:
    """One request. `fields` are what its body has besides the model and `messages` or `prompt`."""

    id: str
    fields: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None

    @classmethod
    def of(cls, item: Item, id: str, defaults: Mapping[str, Any]) -> Asked:
        """Raises RequestError for what is not an `Item`."""
        given: Any = item  # callers need not be typed
        if isinstance(given, str):
            return cls(id, dict(defaults), [{"role": "user", "content": given}])
        if isinstance(given, Mapping):
            fields = {**defaults, **given}
            for name in ("id", "custom_id"):
                fields.pop(name, None)
            messages, prompt = fields.pop("messages", None), fields.pop("prompt", None)
            if (messages is None) == (prompt is None):
                raise RequestError(f"Item {id} needs either messages or prompt.", param="messages")
            return cls(id, fields, messages, prompt)
        if isinstance(given, Sequence) and all(isinstance(message, Mapping) for message in given):
            return cls(id, dict(defaults), [dict(message) for message in given])
        raise RequestError(f"Item {id} is of type {type(given).__name__}; it must be a text, messages, or a body.")

    @property
    def tokens(self) -> int:
        """A guess at what it will cost: four characters to a token, and the longest answer it allows."""
        size = len(self.prompt or "") + sum(len(str(message.get("content", ""))) for message in self.messages or ())
        longest = self.fields.get("max_completion_tokens") or self.fields.get("max_tokens") or _LIKELY_ANSWER
        return size // _CHARS_PER_TOKEN + int(longest)


@dataclass(frozen=True)
class Failure:
    """Why an item has no answer. `status` is None where no HTTP answer came."""

    kind: Kind
    message: str
    status: int | None = None
    code: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one item: `content`, or `error` in its place. `latency_ms` counts from when it was sent, with its
    retries. `route` is the arm that a `CanaryRouter` sent it to. `raw` is the answer of the openai package."""

    id: str
    index: int = 0
    content: str | None = None
    error: Failure | None = None
    model: str | None = None
    finish_reason: str | None = None
    usage: Usage = Usage()
    latency_ms: float = 0.0
    ttft_ms: float | None = None
    route: str | None = None
    raw: Any = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return self.error is None


class Totals:
    """What a client has asked for in all. Safe to read from any thread."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.latency_ms = 0.0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._lock = threading.Lock()

    def add(self, result: Result) -> None:
        with self._lock:
            self.requests += 1
            self.errors += not result.ok
            self.latency_ms += result.latency_ms if result.ok else 0.0
            self.prompt_tokens += result.usage.prompt_tokens
            self.completion_tokens += result.usage.completion_tokens

    @property
    def average_latency_ms(self) -> float:
        """Of the answers that came."""
        answered = self.requests - self.errors
        return self.latency_ms / answered if answered else 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.errors} errors, {self.average_latency_ms:.0f} ms on average, "
            f"{self.prompt_tokens} tokens in, {self.completion_tokens} out"
        )


@dataclass(frozen=True)
class Progress:
    """How far a batch is. `total` is None for items that come from a generator."""

    done: int
    failed: int
    total: int | None
    seconds: float
    batch_size: int

    @property
    def per_second(self) -> float:
        return self.done / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        batch = -(-self.done // self.batch_size)
        batches = "" if self.total is None else f"/{-(-self.total // self.batch_size)}"
        done = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
        return (
            f"batch {batch}{batches}: {done} done, {self.failed} failed, {self.seconds:.1f} s, "
            f"{self.per_second:.1f} requests/s"
        )


@dataclass(frozen=True)
class Batch(Sequence[Result]):
    """The results of a batch, in the order of its items."""

    results: list[Result]
    seconds: float

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> list[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | list[Result]:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    @property
    def ok(self) -> list[Result]:
        return [result for result in self.results if result.ok]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if not result.ok]

    @property
    def per_second(self) -> float:
        """Items per second, with those that failed."""
        return len(self.results) / self.seconds if self.seconds else 0.0

    @property
    def average_latency_ms(self) -> float:
        """Of the answers that came."""
        answered = self.ok
        return sum(result.latency_ms for result in answered) / len(answered) if answered else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self)} items, {len(self.ok)} answered, {len(self.failed)} failed, {self.seconds:.1f} s, "
            f"{self.per_second:.1f} requests/s, {self.average_latency_ms:.0f} ms on average"
        )
