"""One request to an OpenAI-compatible server, measured on the wire."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient

Backend = Literal["openai", "openai-chat"]


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class ChunkUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """What a load generator needs of a streamed chunk; all other fields are skipped without being built."""

    choices: list[Choice] = []
    usage: ChunkUsage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        parts = []
        for choice in self.choices:
            parts.append(choice.text or "")
            if choice.delta is not None:
                parts.append((choice.delta.reasoning_content or "") + (choice.delta.content or ""))
        return "".join(parts)


_decode = msgspec.json.Decoder(Chunk).decode


class EventSplitter:
    """Server-sent events out of pieces that may end anywhere. Yields the `data:` payloads; comments are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> Iterator[bytes]:
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass
class Outcome:
    """One request as the client saw it. Times are seconds; `started` is on the clock of `time.perf_counter`."""

    started: float = 0.0
    queued: float = 0.0
    """How long the client itself held the request back after its due time."""
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    """From start to the last text."""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


@dataclass(frozen=True, kw_only=True)
class Call:
    """How to ask: which dialect, which model, and what to add to every body."""

    backend: Backend
    endpoint: str
    model: str
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None

    def body(self, sample: Sample) -> bytes:
        fields: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.backend == "openai-chat":
            fields["messages"] = [{"role": "user", "content": sample.prompt}]
            fields["max_completion_tokens"] = sample.output_len
        else:
            fields["prompt"] = sample.prompt
            fields["max_tokens"] = sample.output_len
        fields["temperature"] = 0.0
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode({**fields, **self.extra})


async def measure(client: HttpClient, call: Call, sample: Sample, due: float | None = None) -> Outcome:
    """Send one request and time its stream. Latency counts from `due` (a `perf_counter` time) if given.

    A chunk counts as output when it carries text: a chunk that only announces the role is not a first token.
    A failure of any kind ends up in `Outcome.error`.
    """
    begun = time.perf_counter()
    outcome = Outcome(started=begun if due is None else due)
    splitter = EventSplitter()
    texts: list[str] = []
    stamps: list[float] = []
    finished = False

    def on_body(piece: bytes, now: float) -> None:
        nonlocal finished
        for data in splitter.push(piece):
            if data == b"[DONE]":
                finished = True
                continue
            chunk = _decode(data)
            if chunk.error is not None:
                raise ValueError(f"error in the stream: {chunk.error}")
            if chunk.usage is not None:
                outcome.prompt_tokens = chunk.usage.prompt_tokens
                outcome.output_tokens = chunk.usage.completion_tokens
            if text := chunk.text:
                texts.append(text)
                stamps.append(now)

    try:
        response = await client.request("POST", call.endpoint, call.body(sample), on_body, call.timeout)
        if response.status != 200:
            outcome.error = f"HTTP {response.status}: {response.body[:500].decode('utf-8', 'replace')}"
        elif not finished:
            outcome.error = "the stream ended without [DONE]"
    except TimeoutError:
        outcome.error = f"no complete answer within {call.timeout} s"
    except (OSError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.text = "".join(texts)
    if stamps:
        outcome.ttft = stamps[0] - outcome.started
        outcome.itls = [later - earlier for earlier, later in itertools.pairwise(stamps)]
        outcome.latency = stamps[-1] - outcome.started
    elif outcome.ok:
        outcome.ttft = outcome.latency = time.perf_counter() - outcome.started
    outcome.output_tokens = outcome.output_tokens or len(stamps)
    outcome.prompt_tokens = outcome.prompt_tokens or sample.prompt_len
    return outcome
