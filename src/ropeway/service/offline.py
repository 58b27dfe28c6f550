"""The result shape of `LLM`, and its progress bar. Names are vLLM's where the meaning is equal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ropeway.contract import Cancel, FinishReason, GenerateRequest, Step, Submit, TokenEvent, TokenLogprob, Usage
from ropeway.errors import EngineError, RopewayError
from ropeway.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability, by the model's own logits; its rank, 1 the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""By token id: that of the token at the position first, then the likeliest ones."""


def by_token(entry: TokenLogprob, tokenizer: Tokenizer) -> PositionLogprobs:
    """An entry in vLLM's shape."""

    def name(token: int) -> str:
        return tokenizer.token_bytes(token).decode(errors="replace")

    found = {entry.token: Logprob(entry.logprob, entry.rank, name(entry.token))}
    for place, (token, logprob) in enumerate(zip(entry.top_ids, entry.top, strict=True), 1):
        found.setdefault(token, Logprob(logprob, place, name(token)))
    return found


@dataclass
class CompletionOutput:
    """One answer. `finish_reason` is "stop", "length", or "error" for a request that failed alone; `stop_reason` is the
    stop string or stop token id that ended it, None for the model's own end token. `logprobs`, one for each of
    `token_ids`, and `cumulative_logprob`, their sum, are there if they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """All answers to one prompt. `metrics` are the first answer's costs. `error` is set if an answer failed.
    `prompt_logprobs`, if they were asked for, has None for the prompt's first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: Usage | None = None
    num_cached_tokens: int = 0
    error: RopewayError | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None


class Bar:
    """A progress bar on the terminal's standard error, or nothing where that is not a terminal."""

    def __init__(self, total: int, *, show: bool) -> None:
        self._progress: Progress | None = None
        self._tokens = 0
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("[progress.description]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("Answers", total=total, rate="")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, finished: int, new_tokens: int) -> None:
        """Show that `finished` answers are complete and that `new_tokens` have come since the last call."""
        if self._progress is None:
            return
        self._tokens += new_tokens
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed:.0f} tokens/s" if elapsed > 0 else ""
        self._progress.update(self._task, completed=finished, rate=rate)


def run_all(engine: Any, requests: Sequence[GenerateRequest], *, show: bool = False) -> list[TokenEvent]:
    """Run `requests` to their ends in an `Engine`, with a progress bar if `show`, and return the last event of each.
    Raises the error of one that ends otherwise than by itself."""
    found: dict[int, TokenEvent] = {}
    bar = Bar(len(requests), show=show)
    try:
        with bar:
            reports = engine.submit([Submit(request) for request in requests])
            while True:
                for event in (event for report in reports if isinstance(report, Step) for event in report.events):
                    if event.finish in (FinishReason.STOP, FinishReason.LENGTH):
                        found[event.rid] = event
                    elif event.finish is not None:
                        raise event.error.error() if event.error else EngineError(f"A request ended: {event.finish}.")
                bar.update(len(found), 0)
                if len(found) == len(requests):
                    break
                reports = [engine.step()]
        settle(engine)
        return [found[request.rid] for request in requests]
    except BaseException:
        # An interrupted call leaves nothing behind that the next one would have to compute.
        engine.submit([Cancel(request.rid) for request in requests])
        raise


def settle(engine: Any) -> None:
    """Have `engine` do what is left when all requests have ended: copies to the disk, as nobody may ever ask again."""
    while engine.busy:
        engine.step()


def flat_content(content: object) -> str:
    """A message's content as text: a string as it is, a list of text parts joined by line breaks.
    Raises RequestError for anything else."""
    from ropeway.errors import RequestError

    if isinstance(content, str):
        return content
    if content is None:
        return ""
    parts: Sequence[object] = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("A message's content must be text or a list of text parts.", param="messages")
    return "\n".join(text for text in texts if isinstance(text, str))
