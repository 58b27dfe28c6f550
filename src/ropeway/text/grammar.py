"""From what a client writes about the form of an answer to one grammar for `SamplingParams.grammar`.

Everything becomes one kind of text, llguidance's variant of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), which takes JSON Schemas and regular expressions
in its rules. The functions here only translate, in time that is bounded by the limits below; whether a grammar can be
compiled is found out by `ropeway.service.grammars`, where nobody has to wait for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ropeway.errors import RequestError
from ropeway.text.tokenizer import Tokenizer

MAX_CHARS = 256 * 1024
"""Of a schema (all its keys and strings), a regular expression, a grammar, or all choices together."""
MAX_NODES = 8 * 1024
"""Values in a schema, its keys not counted."""
MAX_DEPTH = 64
MAX_CHOICES = 1024
MAX_EBNF = 8 * 1024
"""Characters of a grammar in EBNF, which has to be translated."""

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)  # fmt: skip
"""What `format` can enforce. Any other is a remark to the reader, as JSON Schema has it."""

_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""The model chooses how to cut a text into tokens, among all ways that the grammar allows: so it writes as it learned
to, and nothing must be tokenized while it decodes."""
_SPACE = r"\r?\n[ \t]{0,40}| "
"""White space between the parts of a JSON text: a line break with its indent, or one space. Without a bound, a model
that is at a loss writes blanks for ever."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties", "contentSchema",
)  # fmt: skip
_REMARKS = {
    "format": re.compile(f"({'|'.join(sorted(FORMATS))})$"),
    "$schema": re.compile(r"https?://json-schema\.org/"),
}
"""Keywords that mean something only if they say this. Other dialects, such as OpenAPI's, only add names."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def from_response_format(value: Any) -> str:
    """The grammar of a `response_format` as in OpenAI's API; empty for None and {"type": "text"}.

    A schema is enforced with and without `strict`. Raises RequestError with `param` "response_format".
    """
    param = "response_format"
    if value is None:
        return ""
    kind = _mapping(value, param).get("type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return from_json_schema({"type": "object"}, param=param)
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type is {_shown(kind)}; it must be 'text', 'json_object' or 'json_schema'.", param=param
        )
    given = value.get("json_schema")
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or given.get("schema") is None:
        raise RequestError(
            "response_format.json_schema must be an object with a 'name' and the 'schema' itself.", param=param
        )
    if given.get("strict") not in (None, True, False):
        raise RequestError("response_format.json_schema.strict must be true or false.", param=param)
    return from_json_schema(given["schema"], param=param)


def from_structured_outputs(value: Any) -> str:
    """The grammar of vLLM's `structured_outputs`: exactly one of `json` (a schema, as an object or as JSON text),
    `json_object` (true), `regex`, `choice` (texts) and `grammar` (Lark or EBNF). For JSON there are
    `disable_any_whitespace`, `whitespace_pattern` and `disable_additional_properties`. Empty for None.
    Raises RequestError with `param` "structured_outputs"."""
    param = "structured_outputs"
    if value is None:
        return ""
    options = {key: option for key, option in _mapping(value, param).items() if option not in (None, False)}
    flags = {name: options.pop(name, False) for name in ("disable_any_whitespace", "disable_additional_properties")}
    options.pop("disable_fallback", None)  # there is one back end
    space = options.pop("whitespace_pattern", None)
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise RequestError(f"structured_outputs.{name} must be true or false.", param=param)
    unknown = [name for name in options if name not in _KINDS]
    if unknown:
        raise RequestError(
            f"structured_outputs.{_shown(unknown[0])} is not supported. Use one of {', '.join(_KINDS)}.", param=param
        )
    if len(options) != 1:
        raise RequestError(
            f"structured_outputs names {len(options)} kinds of output; exactly one of {', '.join(_KINDS)} is needed.",
            param=param,
        )
    ((kind, content),) = options.items()
    if kind in ("json", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else content
        if content is not True and kind == "json_object":
            raise RequestError("structured_outputs.json_object must be true or false.", param=param)
        compact, closed = flags.values()
        return from_json_schema(schema, param=param, space="" if compact else space, closed=closed)
    if any(flags.values()) or space is not None:
        raise RequestError(f"White space and properties are options for JSON, not for {kind!r}.", param=param)
    if kind == "choice":
        return from_choice(content, param=param)
    _text(content, f"structured_outputs.{kind}", param)
    return from_regex(content, param=param) if kind == "regex" else from_grammar(content, param=param)


def from_json_schema(schema: Any, *, param: str, space: str | None = None, closed: bool = False) -> str:
    """JSON texts that a schema allows. `schema`, `space` and `closed` as in `json_rule`. Raises RequestError."""
    return from_lark(f"start: {json_rule(schema, param=param, space=space, closed=closed)}\n", param=param, limit=False)


def from_regex(pattern: str, *, param: str) -> str:
    """Texts that match all of `pattern`, in the syntax of Rust's regex crate. Raises RequestError."""
    from llguidance import regex_to_lark

    _bounded(len(pattern), param)
    return from_lark(f"start: OUTPUT\nOUTPUT: /{regex_to_lark(pattern, 'd')}/\n", param=param, limit=False)


def from_choice(choices: Any, *, param: str) -> str:
    """One of several texts. Raises RequestError."""
    if not isinstance(choices, list | tuple) or not choices:
        raise RequestError("structured_outputs.choice must be a list of texts with at least one.", param=param)
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"There are {len(choices)} choices; at most {MAX_CHOICES} are allowed.", param=param)
    for choice in choices:
        _text(choice, "Each of structured_outputs.choice", param)
    _bounded(sum(map(len, choices)), param)
    options = " | ".join(map(literal, dict.fromkeys(choices)))
    return from_lark(f"start: OUTPUT\nOUTPUT: {options}\n", param=param, limit=False)


def from_grammar(text: str, *, param: str) -> str:
    """A grammar that a client wrote, in Lark or, if it has a rule with `::=`, in the EBNF of llama.cpp (GBNF), whose
    first rule is `root`. Raises RequestError."""
    from llguidance.gbnf_to_lark import any_to_lark

    if "::=" in text:
        _bounded(len(text), param, MAX_EBNF)
        try:
            text = any_to_lark(text)
        except Exception as error:  # the translator raises bare ones
            raise RequestError(f"The EBNF grammar cannot be read: {str(error)[:200]}.", param=param) from None
    return from_lark(text, param=param)


def from_lark(text: str, *, param: str = "tools", limit: bool = True) -> str:
    """The grammar of a text in llguidance's Lark, whose first rule is `start`. Texts and schemas are put into it with
    `literal` and `json_rule`; `<name>` and `<[id]>` are special tokens. `param` is the request's field that it comes
    from. Raises RequestError."""
    if limit:
        _bounded(len(text), param)
    return f"// {param}\n{_OPTIONS}{text}"


def json_rule(schema: Any, *, param: str = "tools", space: str | None = None, closed: bool = False) -> str:
    """A JSON Schema as the right side of a rule in Lark: `%json {...}`.

    `schema` is an object, a boolean, or JSON text. `space` is a regular expression of the white space between parts
    (None: line breaks with indents and single blanks; empty: none at all). `closed` forbids properties that are not
    named wherever the schema does not say. Raises RequestError if it is too large or leads outside itself.
    """
    if isinstance(schema, str):
        _bounded(len(schema), param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"The JSON schema is not valid JSON: {str(error)[:200]}. Let a library write it.", param=param
            ) from None
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"The JSON schema is {_shown(schema)}; it must be an object.", param=param)
    _measure(schema, param)
    # A schema of booleans means the same as one of objects, and only those can have options.
    schema = {} if schema is True else {"enum": []} if schema is False else _tidy(schema, closed, param)
    if space is not None:
        _text(space, "structured_outputs.whitespace_pattern", param)
        _bounded(len(space), param, 256)
    options = {"whitespace_flexible": False} if space == "" else {"whitespace_pattern": space or _SPACE}
    try:
        return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"The JSON schema is not plain JSON: {str(error)[:200]}.", param=param) from None


def literal(text: str) -> str:
    """`text` as it is written in Lark, quotes included."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def vocabulary(tokenizer: Tokenizer, ends: Sequence[int], size: int) -> tuple[list[bytes], list[int], list[int]]:
    """What a `grammar_worker.Vocabulary` is made of, for logits of `size` tokens; `ends` are those that end an answer.
    Blocks for about four microseconds a token."""
    known = min(size, tokenizer.vocab_size)
    tokens = [tokenizer.token_bytes(token) for token in range(known)] + [b""] * (size - known)
    return tokens, [i for i in sorted(tokenizer.special_ids) if i < size], [i for i in ends if i < size]


def param_of(grammar: str) -> str | None:
    """The request's field that a grammar was made from."""
    first = grammar.partition("\n")[0]
    return first.removeprefix("// ") if first.startswith("// ") else None


def _measure(schema: Any, param: str) -> None:
    """Refuse what is too large or too deep, having looked at no more than is allowed."""
    nodes = chars = 0
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep. Flatten it.", param=param)
        below: list[Any] = []
        for value in level:
            nodes += 1
            if isinstance(value, Mapping):
                chars += sum(len(str(key)) for key in value)
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            elif isinstance(value, str):
                chars += len(value)
        if nodes + len(below) > MAX_NODES:
            raise RequestError(f"The JSON schema has more than {MAX_NODES} values. Make it smaller.", param=param)
        _bounded(chars, param)
        level = below


def _tidy(schema: Mapping[str, Any], closed: bool, param: str) -> dict[str, Any]:
    """The schema with what only people read left out, in the same order, which is that of the answer's properties."""

    def inner(value: Any) -> Any:
        return _tidy(value, closed, param) if isinstance(value, Mapping) else value

    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            value = {name: inner(part) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list | tuple):
            value = [inner(part) for part in value]
        elif key in _SINGLE:
            value = [inner(part) for part in value] if isinstance(value, list | tuple) else inner(value)
        elif _is_remark(key, value):
            continue
        elif key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise RequestError(
                f"The JSON schema refers to {_shown(value)}, which is not inside it. Put it under $defs.", param=param
            )
        kept[key] = value
    if not kept.keys() & {"properties", "patternProperties"}:
        _name(kept)
    if closed and "additionalProperties" not in kept and kept.keys() & {"properties", "patternProperties"}:
        kept["additionalProperties"] = False
    return kept


def _is_remark(key: str, value: Any) -> bool:
    if key in _REMARKS:
        return not (isinstance(value, str) and _REMARKS[key].match(value))
    return key == "uniqueItems" and value is False


def _name(schema: dict[str, Any]) -> None:
    """Say what a schema of a mapping asks of its names, as Pydantic and Zod do, in keywords that can be enforced."""
    names = schema.get("propertyNames")
    if not isinstance(names, Mapping):
        return
    rules = {key: rule for key, rule in names.items() if key not in ("title", "description")}
    kind, values, pattern = rules.pop("type", "string"), rules.pop("enum", None), rules.pop("pattern", None)
    if rules or kind != "string" or (values is not None and pattern is not None):
        return
    del schema["propertyNames"]
    if values is None and pattern is None:
        return  # all names are strings
    part = schema.pop("additionalProperties", {})
    if pattern is not None:
        schema["patternProperties"] = {pattern: part}
    else:
        schema["properties"] = {value: part for value in values if isinstance(value, str)}
    schema["additionalProperties"] = False


def _mapping(value: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{param} is {_shown(value)}; it must be an object.", param=param)
    return value


def _text(value: Any, what: str, param: str) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{what} is {_shown(value)}; it must be a text.", param=param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} has half a surrogate pair, which is not valid Unicode.", param=param) from None


def _bounded(chars: int, param: str, most: int = MAX_CHARS) -> None:
    if chars > most:
        raise RequestError(f"{param} has {chars} characters or more; at most {most} are allowed.", param=param)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "too large a number"
    return text if len(text) <= 60 else text[:57] + "..."
