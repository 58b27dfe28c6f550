"""From the bytes of a body to a checked type, with the field at fault in every complaint."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from ropeway.api.errors import HttpError
from ropeway.api.limits import check_shape
from ropeway.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)

_NULL = (b"null",)
_NULL_OR_FALSE = (b"null", b"false")
_NULL_OR_EMPTY = (b"null", b"[]")

# Fields with an effect that does not exist yet: the values that ask for nothing, and what to tell whoever asks.
# A field that would change the answer is refused; a field that nobody knows is ignored and named in a header.
_REFUSED: dict[str, tuple[tuple[bytes, ...], str]] = {
    "logprobs": (_NULL_OR_FALSE, "Log probabilities are not supported."),
    "prompt_logprobs": (_NULL, "Log probabilities are not supported."),
    "use_beam_search": (_NULL_OR_FALSE, "Beam search is not supported; use n with sampling."),
    "length_penalty": ((b"null", b"1", b"1.0"), "Beam search is not supported, so a length penalty has no meaning."),
    "truncate_prompt_tokens": (_NULL, "Prompts are never truncated; shorten the prompt."),
    "truncation_side": (_NULL, "Prompts are never truncated; shorten the prompt."),
    "allowed_token_ids": (_NULL, "A list of allowed tokens is not supported; use logit_bias."),
    "bad_words": (_NULL_OR_EMPTY, "Forbidden words are not supported; use logit_bias."),
    "spaces_between_special_tokens": ((b"null", b"true"), "Spaces between special tokens cannot be switched off."),
    "return_tokens_as_token_ids": (_NULL_OR_FALSE, "Token ids in answers are not supported."),
    "return_token_ids": (_NULL_OR_FALSE, "Token ids in answers are not supported."),
    "structured_outputs": (_NULL, "Structured output is not supported."),
    "guided_json": (_NULL, "Structured output is not supported."),
    "guided_regex": (_NULL, "Structured output is not supported."),
    "guided_choice": (_NULL, "Structured output is not supported."),
    "guided_grammar": (_NULL, "Structured output is not supported."),
    "response_format": ((b"null", b'{"type":"text"}'), "Only the response format 'text' is supported."),
    "kv_transfer_params": (_NULL, "Transfer of KV blocks is not supported."),
    "stream_interval": ((b"null", b"1"), "Tokens are streamed as they come; an interval is not supported."),
    "thinking_token_budget": (_NULL, "A budget for reasoning tokens is not supported."),
    "repetition_detection": (_NULL, "Detection of repetitions is not supported; use repetition_penalty."),
    "logits_processors": (_NULL_OR_EMPTY, "Custom logits processors are not supported."),
    "vllm_xargs": ((b"null", b"{}"), "Extra engine arguments are not supported."),
}
_REFUSED_CHAT: dict[str, tuple[tuple[bytes, ...], str]] = {
    "top_logprobs": ((b"null", b"0"), "Log probabilities are not supported."),
    "tools": (_NULL_OR_EMPTY, "Tool calling is not supported."),
    "tool_choice": ((b"null", b'"none"'), "Tool calling is not supported; 'none' is the only choice."),
    "functions": (_NULL_OR_EMPTY, "Function calling is not supported."),
    "function_call": ((b"null", b'"none"'), "Function calling is not supported; 'none' is the only choice."),
    "modalities": ((b"null", b'["text"]'), "Only the modality 'text' is supported."),
    "audio": (_NULL, "Audio output is not supported."),
    "prediction": (_NULL, "Predicted output is not supported."),
    "web_search_options": (_NULL, "Web search is not supported."),
    "store": (_NULL_OR_FALSE, "Answers are not stored; send store: false or leave it out."),
    "verbosity": ((b"null", b'"medium"'), "The verbosity cannot be chosen; ask for it in a message."),
    "moderation": (_NULL, "Moderation is not supported."),
    "documents": (_NULL_OR_EMPTY, "Documents for the chat template are not supported; put them into a message."),
    "chat_template": (_NULL, "A request cannot bring its own chat template; start the server with --chat-template."),
    "echo": (_NULL_OR_FALSE, "Repeating the prompt in the answer is not supported."),
    "include_reasoning": ((b"null", b"true"), "Reasoning cannot be separated from the answer."),
}
_REFUSED_COMPLETION: dict[str, tuple[tuple[bytes, ...], str]] = {
    "suffix": ((b"null", b'""'), "Text after the insertion (suffix) is not supported."),
    "echo": (_NULL_OR_FALSE, "Repeating the prompt in the answer is not supported."),
    "best_of": ((b"null", b"1"), "Choosing the best of several answers is not supported; use n."),
    "prompt_embeds": (_NULL, "Prompts as embeddings are not supported."),
}
CHAT_REFUSED = _REFUSED | _REFUSED_CHAT
COMPLETION_REFUSED = _REFUSED | _REFUSED_COMPLETION

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
        return RequestError(f"The body is not valid JSON: {text}.", param=where or None)
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
    return RequestError(f"Invalid value for '{path or 'body'}': {text}.", param=path or None)


def decode(kind: type[T], body: bytes, refused: dict[str, tuple[tuple[bytes, ...], str]]) -> tuple[T, list[str]]:
    """The body as `kind`, and the names of its unknown fields. Raises RequestError or HttpError (both 400)."""
    check_shape(body)
    if not body.strip():
        raise HttpError(400, "The body is empty; it must be a JSON object.")
    try:
        fields = _top_level.decode(body)
        for name, raw in fields.items():
            if name in refused and _compact(raw) not in refused[name][0]:
                raise RequestError(refused[name][1], param=name)
        value = msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise complaint(error) from None
    except RecursionError:
        raise HttpError(400, "The body nests too deeply. Flatten it.") from None
    known = kind.__struct_fields__
    return value, [name for name in fields if name not in known and name not in refused]


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
    return {"x-ropeway-ignored-params": ", ".join(shown)}


def _compact(raw: msgspec.Raw) -> bytes:
    text = bytes(raw)
    if len(text) > 64:
        return text
    return re.sub(rb"\s+", b"", text)
