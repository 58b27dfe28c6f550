"""From the bytes of a body to a checked type, with the field at fault in every complaint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from ropeway.api.errors import HttpError
from ropeway.api.limits import MAX_FIELDS, check_shape
from ropeway.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)

Refused = Mapping[str, tuple[tuple[bytes, ...], str]]
"""Fields that would change the answer and cannot be honoured: the values that ask for nothing, and what to tell
whoever asks for more. A field that nobody knows is ignored and named in a header."""

_NULL = (b"null",)
_NULL_OR_FALSE = (b"null", b"false")
_NULL_OR_EMPTY = (b"null", b"[]")
_USE = "Send structured_outputs instead."

_REFUSED: Refused = {
    "guided_json": (_NULL, _USE),
    "guided_regex": (_NULL, _USE),
    "guided_choice": (_NULL, _USE),
    "guided_grammar": (_NULL, _USE),
    "guided_decoding_backend": (_NULL, "There is one back end for structured output."),
    "kv_transfer_params": (_NULL, "Transfer of KV blocks is not supported."),
    "thinking_token_budget": (_NULL, "A budget for reasoning tokens is not supported; use max_tokens."),
    "repetition_detection": (_NULL, "Detection of repetitions is not supported; use repetition_penalty."),
    "logits_processors": (_NULL_OR_EMPTY, "Custom logits processors are not supported."),
    "vllm_xargs": ((b"null", b"{}"), "Extra engine arguments are not supported."),
    "mm_processor_kwargs": ((b"null", b"{}"), "This model reads only text."),
}
_REFUSED_CHAT: Refused = {
    "modalities": ((b"null", b'["text"]'), "Only the modality 'text' is supported."),
    "audio": (_NULL, "Audio output is not supported."),
    "prediction": (_NULL, "Predicted output is not supported."),
    "web_search_options": (_NULL, "Web search is not supported."),
    "store": (_NULL_OR_FALSE, "Chat completions are not stored; use /v1/responses, or send store: false."),
    "moderation": (_NULL, "Moderation is not supported."),
    "chat_template": (_NULL, "A request cannot bring its own chat template; start the server with --chat-template."),
}
_REFUSED_COMPLETION: Refused = {
    "suffix": ((b"null", b'""'), "Text after the insertion (suffix) is not supported."),
    "prompt_embeds": (_NULL, "Prompts as embeddings are not supported."),
}
CHAT_REFUSED: Refused = {**_REFUSED, **_REFUSED_CHAT}
COMPLETION_REFUSED: Refused = {**_REFUSED, **_REFUSED_COMPLETION}

IGNORED: Mapping[str, str] = {
    "user": "Tenants are told apart by their keys, not by names that anybody can send.",
    "safety_identifier": "As `user`.",
    "metadata": "Completions are not stored, so there is nothing to find again by a label.",
    "prompt_cache_key": "There is one cache, and it finds prefixes by their content.",
    "prompt_cache_retention": "What stays cached is the operator's to say (`/admin/pins`).",
    "prompt_cache_options": "As `prompt_cache_retention`.",
    "session_id": "An engine has no use for it; canaries of a route keep a session together by it.",
    "spaces_between_special_tokens": "No supported tokenizer puts any there.",
}
"""Fields that are known and change nothing, which the header says like of unknown ones."""

IGNORED_HEADER: Final = "x-ropeway-ignored-params"
_HARMLESS_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_NAMED = 32
_AT = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
_WORDS = {
    "`float": "`a number", "`int": "`a whole number", "`str": "`a string", "`array": "`a list",
    "`object": "`an object", "`bool": "`true or false", " | null`": " or null`",
}  # fmt: skip
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])


def complaint(error: msgspec.MsgspecError, where: str = "") -> RequestError:
    """A decoding error as a sentence. `where` is the field that the decoded bytes were found in."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return RequestError(f"The body is not valid JSON: {text}. Let a library write it.", param=where or None)
    found = _AT.search(text)
    path = where + (("." if where and not found[1].startswith("[") else "") + found[1] if found else "")
    path = path.replace("[...]", "")
    text = _AT.sub("", text)
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"Missing required field '{name}'.", param=name)
    for technical, plain in _WORDS.items():
        text = text.replace(technical, plain)
    text = text.replace("`", "").replace("Expected", "expected").replace("Invalid enum value", "not a known value:")
    step = " See /docs for those there are." if "not a known value" in text else ""
    return RequestError(f"Invalid value for '{path or 'body'}': {text}.{step}", param=path or None)


def fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a body, undecoded. Raises RequestError or HttpError (400)."""
    check_shape(body)
    if not body.strip():
        raise HttpError(400, "The body is empty; it must be a JSON object.")
    try:
        fields = _top_level.decode(body)
    except msgspec.MsgspecError as error:
        raise complaint(error) from None
    except RecursionError:
        raise HttpError(400, "The body nests too deeply. Flatten it.") from None
    if len(fields) > MAX_FIELDS:
        raise HttpError(400, f"The body has {len(fields)} fields; at most {MAX_FIELDS} are accepted.")
    return fields


def decode(kind: type[T], body: bytes, refused: Refused) -> tuple[T, list[str]]:
    """The body as `kind`, and the names of its fields that have no effect. Raises RequestError or HttpError (400)."""
    value, unknown = decode_known(kind, body, refused)
    return value, list(unknown)


def decode_known(kind: type[T], body: bytes, refused: Refused) -> tuple[T, dict[str, msgspec.Raw]]:
    """The body as `kind`, and those of its fields that it does not know, undecoded. Raises as `decode`."""
    fields = fields_of(body)
    try:
        for name, raw in fields.items():
            if name in refused and _compact(raw) not in refused[name][0]:
                raise RequestError(refused[name][1], param=name)
        value = msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise complaint(error) from None
    except RecursionError:
        raise HttpError(400, "The body nests too deeply. Flatten it.") from None
    known = kind.__struct_fields__
    return value, {
        name: raw for name, raw in fields.items() if name not in known and name not in refused and not left_out(raw)
    }


def left_out(raw: msgspec.Raw) -> bool:
    """Whether a raw field is missing or null."""
    return len(raw) < 5 and bytes(raw) in (b"", b"null")


def decode_field(raw: msgspec.Raw, kind: Any, where: str) -> Any:
    """One raw field as `kind`. Raises RequestError that names it."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise complaint(error, where) from None


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names ignored fields; client text that is not a plain name appears as '?'."""
    if not names:
        return {}
    shown = [name if _HARMLESS_NAME.fullmatch(name) else "?" for name in names[:_MAX_NAMED]]
    if len(names) > _MAX_NAMED:
        shown.append("...")
    return {IGNORED_HEADER: ", ".join(shown)}


def _compact(raw: msgspec.Raw) -> bytes:
    text = bytes(raw)
    if len(text) > 64:
        return text
    return re.sub(rb"\s+", b"", text)
