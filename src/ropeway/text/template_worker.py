"""Renders chat templates in a process of its own, so that a template that runs away can be killed.

A template comes with a model and is a program by a stranger. The sandbox keeps it from reaching anything, but not from
taking for ever (nested loops) or all memory ('a' * 10**9, which the compiler already computes). Here both have limits
that the kernel holds. The process has no secrets: its environment is a short list, and it cannot write files.

It is started as a script and imports nothing of Ropeway, so that it starts in the time of Python and Jinja. It speaks
over stdin and stdout in frames of 4 bytes of big-endian length and msgpack. The first frame is the settings
`{"sources": {name: template}, "deadline", "max_output", "max_memory"}`, answered by an empty frame; each further one is
a job `[name, context]`, answered by `[kind, text]`: "ok", "refused" (the template called raise_exception), "large",
"memory" or "error". Without a context the template is only compiled. A job that takes longer than the deadline ends the
process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import msgspec


class Refused(jinja2.TemplateError):
    """`raise_exception` of the template: the messages do not suit the model."""


class Large(Exception):
    """The output is longer than allowed."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model is trained on; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

    def _through(self, caller: jinja2.runtime.Macro) -> str:
        text: str = caller()
        return text


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The dialect of chat templates as Hugging Face defines it
    (https://huggingface.co/docs/transformers/chat_templating_writing)."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Arguments(dict[str, Any]):
    """Arguments of an earlier call: an object to templates that look into it or write it as JSON, and its JSON text to
    those that take it for a text. Families differ in that, and clients cannot know."""

    def __str__(self) -> str:
        return _tojson(self)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def _with_arguments(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"] = Arguments(function["arguments"])


class Renderer:
    """Compiled templates and the limits on them."""

    def __init__(self, sources: dict[str, str], deadline: float, max_output: int) -> None:
        self._sources = sources
        self._deadline = deadline
        self._max_output = max_output
        self._env = environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def render(self, name: str, context: dict[str, Any] | None) -> tuple[str, str]:
        """The kind of outcome and its text, empty without a context. Does not return if the deadline passes."""
        # SIGALRM's default action ends the process even in the middle of a long operation in C.
        signal.setitimer(signal.ITIMER_REAL, self._deadline)
        try:
            if name not in self._compiled:
                self._compiled[name] = self._env.from_string(self._sources[name])
            if context is None:
                return "ok", ""
            _with_arguments(context["messages"])
            parts: list[str] = []
            size = 0
            for part in self._compiled[name].generate(**context):
                size += len(part)
                if size > self._max_output:
                    raise Large
                parts.append(part)
            return "ok", "".join(parts)
        except Refused as error:
            return "refused", error.message or ""
        except Large:
            return "large", f"more than {self._max_output} characters"
        except (MemoryError, OverflowError):
            return "memory", ""
        except Exception as error:
            where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            return "error", f"{type(error).__name__}: {error}{where}"[:2000]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _read(source: BinaryIO) -> Any:
    head = source.read(4)
    if len(head) < 4:
        sys.exit(0)  # the server has gone
    return msgspec.msgpack.decode(source.read(int.from_bytes(head, "big")))


def _write(sink: BinaryIO, frame: bytes) -> None:
    sink.write(len(frame).to_bytes(4, "big") + frame)
    sink.flush()


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    settings = _read(source)
    resource.setrlimit(resource.RLIMIT_AS, (settings["max_memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    renderer = Renderer(settings["sources"], settings["deadline"], settings["max_output"])
    _write(sink, b"")
    while True:
        try:
            name, context = _read(source)
            frame = msgspec.msgpack.encode(renderer.render(name, context))
        except (MemoryError, ValueError) as error:
            frame = msgspec.msgpack.encode(("memory" if isinstance(error, MemoryError) else "error", str(error)))
        _write(sink, frame)


if __name__ == "__main__":
    main()
