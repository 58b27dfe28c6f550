"""Log lines: one event is one line, whatever a client sent, and prompts are in none of them."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO

from ropeway.contract import EngineStats, Report, Step

_log = logging.getLogger(__name__)
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029",
}  # fmt: skip


class TextFormatter(logging.Formatter):
    """`INFO 11-20 14:03:07.512 message`; line breaks and control characters of the message are escaped. A traceback
    follows on lines of its own, indented."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{record.levelname} {stamp}.{int(record.msecs):03d} {record.getMessage().translate(_ESCAPES)}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    {part.translate(_ESCAPES)}" for part in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and trace if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure(level: str, shape: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Send the logs of Ropeway and of the HTTP server to `stream` (default: stderr). Calling it again replaces that."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if shape == "json" else TextFormatter())
    for name, least in (("ropeway", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


class StatsLine:
    """vLLM's statistics line every `interval` seconds while the engine works. Subscribe `on_report` to its reports.

    It needs no timer: without steps there is nothing to say.
    """

    def __init__(self, interval: float, *, engine: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._engine = engine
        self._clock = clock
        self._since: float | None = None
        self._first: EngineStats | None = None

    def on_report(self, report: Report) -> None:
        if self._interval <= 0 or not isinstance(report, Step):
            return
        now, stats = self._clock(), report.stats
        if self._since is None or self._first is None or stats.step < self._first.step:
            self._since, self._first = now, stats
            return
        idle = not stats.running and not stats.waiting
        if now - self._since < self._interval:
            return
        _log.info("%s", self.line(self._first, stats, now - self._since, self._engine))
        self._since, self._first = (None, None) if idle else (now, stats)

    @staticmethod
    def line(first: EngineStats, last: EngineStats, seconds: float, engine: int = 0) -> str:
        """Averages between two steps, and the state after the second. Tokens are counted when they are computed."""
        prompt = (last.prompt_tokens - first.prompt_tokens) / seconds
        generation = (last.generation_tokens - first.generation_tokens) / seconds
        usage = 100 * last.blocks_used / last.blocks_total if last.blocks_total else 0.0
        hits = 100 * last.cache_hits / last.cache_queries if last.cache_queries else 0.0
        return (
            f"Engine {engine:03}: Avg prompt throughput: {prompt:.1f} tokens/s, "
            f"Avg generation throughput: {generation:.1f} tokens/s, "
            f"Running: {last.running} reqs, Waiting: {last.waiting} reqs, "
            f"GPU KV cache usage: {usage:.1f}%, Prefix cache hit rate: {hits:.1f}%"
        )
