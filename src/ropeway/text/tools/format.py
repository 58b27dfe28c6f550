"""What a format of tool calls is: how to read it, and how to write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ropeway.errors import RequestError
from ropeway.text.lark import ANYTHING, Lark
from ropeway.text.reader import Reader, Steps


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object. A `strict` one
    is called with arguments that follow the schema, whatever the model would rather say."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """`parameters` as a schema that nothing but an object follows."""
        return {"properties": {}, **self.parameters, "type": "object"}


Tools = Mapping[str, Tool]
"""The tools of a request by their names."""


def read_calls(
    reader: Reader,
    call: Callable[[str], Steps[bool]],
    begins: tuple[str, ...],
    ends: tuple[str, ...] = (),
    *,
    start: str = "",
) -> Steps[None]:
    """Read an answer in which each of `begins`, and at its very beginning `start`, may begin a call.

    `call` reads it, from behind the tag that it is given. It returns False, with all it has read still held, if there
    is none: then the tag is content, like all that follows. `ends` may stand behind a call, the last of them behind all
    calls, and are content elsewhere.
    """
    open_ends: tuple[str, ...] = ()
    tag = ""
    if start:
        yield from reader.space()
        tag = yield from reader.accept(start)
    while tag or (tag := (yield from reader.until("content", *begins, ends=open_ends))):
        if tag not in ends and not (yield from call(tag)):
            reader.emit("content")
        else:
            open_ends = () if ends and tag == ends[-1] else ends
            yield from reader.space()
            reader.drop()
        tag = ""


def parameters(tool: Tool, names: re.Pattern[str]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Name and schema of each of a tool's parameters, and whether it is required. Raises RequestError if there are none
    of an object, or one whose name is not among `names`, those that the format can write."""
    schema = tool.schema
    properties, required = schema["properties"], schema.get("required", ())
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        raise RequestError(f"The parameters of {tool.name} are no JSON schema of an object.", param="tools")
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for key, value in properties.items():
        if not names.fullmatch(key):
            raise RequestError(
                f"A parameter of {tool.name} is named {key!r}, which this model's format of calls cannot write. Give "
                "it another name.",
                param="tools",
            )
        yield key, {**value, **definitions} if isinstance(value, Mapping) else definitions, key in required


def json_arguments(lark: Lark, tool: Tool) -> str:
    """Arguments written as a JSON object."""
    return lark.json(tool.schema)


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models calls tools.

    `read` takes an answer apart, with the request's tools at hand. Calls are written one after the other, each as
    `call` with the tool's name for $NAME and its arguments for $ARGS, with `between` between them, `begin` before the
    first and `end` after the last. `tags` are the parts of all that which may be single tokens. Where `trigger`, with
    which the first call begins, stands in an answer, there is a call; empty if calls begin with nothing so special.
    """

    read: Callable[[Reader, Tools], Steps[None]]
    call: str
    tags: tuple[str, ...] = ()
    trigger: str = ""
    begin: str = ""
    between: str = ""
    end: str = ""
    arguments: Callable[[Lark, Tool], str] = json_arguments

    @property
    def marked(self) -> bool:
        """Whether calls begin with a tag, and not like any JSON or Python."""
        return self.trigger[:1] not in ("", "{")

    def required(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """An expression for one call, or with `parallel` for one or more, and nothing else."""
        return self._calls(lark, tools, parallel, "")

    def allowed(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """An expression for any text, in which the calls are well-formed, and those of strict tools follow their
        schemas. Without `parallel` the text ends with its first call."""
        loose = [tool if tool.strict else Tool(tool.name, {"additionalProperties": True}) for tool in tools]
        calls = f"{lark.up_to(self.trigger)} {self._calls(lark, loose, parallel, self.trigger)}"
        anything = lark.rule(ANYTHING)
        return f"({calls})* {anything}" if parallel else f"{calls} | {anything}"

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool, trigger: str) -> str:
        before, after = self.call.split("$NAME")
        middle, after = after.split("$ARGS")
        bodies = [f"{lark.text(f'{tool.name}{middle}', self.tags)} {self.arguments(lark, tool)}" for tool in tools]
        body = lark.rule(" | ".join(bodies)) + " " + lark.text(after, self.tags)
        first = lark.text((self.begin + before).removeprefix(trigger), self.tags)
        more = f"({lark.text(self.between + before, self.tags)} {body})*" if parallel else ""
        return " ".join(part for part in (first, body, more, lark.text(self.end, self.tags)) if part.strip())
