"""A link whose engine is the test itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ropeway.contract import (
    Cancel,
    Command,
    EngineStats,
    ExecutorInfo,
    FinishReason,
    GenerateRequest,
    Report,
    Step,
    Submit,
    TokenEvent,
    Usage,
)
from ropeway.contract.channel import LinkState
from ropeway.errors import NotReadyError
from ropeway.service.loader import ModelText
from ropeway.service.service import EngineTextService
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer, Tokenizer

INFO = ExecutorInfo(
    model="scripted", device="none", dtype="none", num_blocks=64, block_size=16, max_slots=8, max_model_len=200,
    vocab_size=258,
)  # fmt: skip
STATS = EngineStats(
    step=1, running=0, waiting=0, slots=8, blocks_total=64, blocks_used=0, blocks_cached=0, rows=0, step_tokens=0,
    step_seconds=0.0, prompt_tokens=0, generation_tokens=0, cache_queries=0, cache_hits=0, preemptions=0,
)  # fmt: skip
USAGE = Usage(
    prompt_tokens=3, completion_tokens=99, cached_tokens=1, preemptions=2, first_scheduled_s=0.1, first_token_s=0.2,
    total_s=0.3,
)  # fmt: skip


class ScriptedLink:
    """Accepts every request at once unless `accepts` is false; the rest is what the test tells with `news`."""

    def __init__(self) -> None:
        self.state = LinkState.READY
        self.info: ExecutorInfo | None = INFO
        self.accepts = True
        self.sent: list[Command] = []
        self._listeners: list[Callable[[Report], None]] = []

    def send(self, command: Command) -> None:
        if self.state not in (LinkState.READY, LinkState.DRAINING):
            raise NotReadyError("not ready")
        self.sent.append(command)
        if self.accepts and isinstance(command, Submit):
            self.news(TokenEvent(command.request.rid, accepted=True))

    def subscribe(self, listener: Callable[[Report], None]) -> None:
        self._listeners.append(listener)

    def report(self, report: Report) -> None:
        for listener in self._listeners:
            listener(report)

    def news(self, *events: TokenEvent) -> None:
        self.report(Step(list(events), STATS))

    def text(self, rid: int, text: str, finish: FinishReason | None = None, **more: Any) -> None:
        """An event with the bytes of `text` as tokens."""
        usage = USAGE if finish is not None else None
        self.news(TokenEvent(rid, list(text.encode()), finish=finish, usage=usage, **more))

    @property
    def requests(self) -> list[GenerateRequest]:
        return [command.request for command in self.sent if isinstance(command, Submit)]

    @property
    def cancels(self) -> list[Cancel]:
        return [command for command in self.sent if isinstance(command, Cancel)]


def make_text(tokenizer: Tokenizer | None = None, template: ChatTemplate | None = None) -> ModelText:
    return ModelText(
        name="scripted",
        tokenizer=tokenizer or ByteTokenizer(),
        template=template,
        eos_ids=(ByteTokenizer.EOS,),
        context_limit=200,
        generation={},
    )


def make_service(link: ScriptedLink, **options: Any) -> EngineTextService:
    return EngineTextService(link, make_text(options.pop("tokenizer", None), options.pop("template", None)), **options)
