"""What `prompt` of /v1/completions and `input` of /v1/embeddings may be: a text or token ids, or a list of either."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ropeway.api.parse import decode_field
from ropeway.api.schema import TokenId
from ropeway.errors import ContextLengthError, RequestError

_KIND = re.compile(rb"\s*(?:(\")|\[\s*(?:(\")|(\[)|(\])|([-\d])))")


def parse_prompts(raw: msgspec.Raw, where: str, longest: int | None, most: int) -> list[dict[str, Any]]:
    """The prompts as fields of TextRequest, from the field `where`. Each list of token ids has at least one.

    With `longest`, which is the model's context, token ids that are more than `most` prompts could have are refused by
    counting commas, before there is an object for each. Raises RequestError (400).
    """
    found = _KIND.match(bytes(raw)[:256])
    if found is None:
        message = f"{where} must be text, a list of texts, token ids, or a list of lists of token ids."
        raise RequestError(message, param=where)
    text, texts, lists, empty, ids = found.groups()
    if empty:
        raise RequestError(f"{where} is empty; send at least one text or token id.", param=where)
    if text:
        return [{"text": decode_field(raw, str, where)}]
    if texts:
        return [{"text": one} for one in decode_field(raw, list[str], where)]
    if longest is not None:
        _check_count(raw, where, longest, 1 if ids else most)
    if ids:
        return [{"tokens": decode_field(raw, list[TokenId], where)}]
    assert lists
    many = [{"tokens": one} for one in decode_field(raw, list[list[TokenId]], where)]
    for number, one in enumerate(many):
        if not one["tokens"]:
            name = f"{where}[{number}]"
            raise RequestError(f"{name} is empty; send at least one token id.", param=name)
    return many


def _check_count(raw: msgspec.Raw, where: str, longest: int, prompts: int) -> None:
    count = bytes(raw).count(b",") + 1
    if count > longest * prompts:
        raise ContextLengthError(
            f"This model's maximum context length is {longest} tokens. However, your {where} has {count} tokens. "
            "Shorten it.",
            param=where,
        )
