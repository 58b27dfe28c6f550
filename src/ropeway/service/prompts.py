"""What an `LLM` takes as prompts, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from ropeway.config import EngineConfig
from ropeway.contract import SamplingParams
from ropeway.contract.executor import Executor
from ropeway.errors import RequestError
from ropeway.service.encoder import Encoder
from ropeway.service.loader import ModelText
from ropeway.service.request import TextRequest


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt | list[int]


class Parts:
    """What the parts of an `LLM` that do one kind of work share."""

    config: EngineConfig
    _executor: Executor
    _text: ModelText
    _engine: Any
    _encoder: Encoder
    _rids: Iterator[int]


def requests_of(prompts: Any) -> list[TextRequest]:
    """One request for each of `prompts`, or for the one that it is, named by its number. Raises RequestError."""
    return [_request(prompt, number) for number, prompt in enumerate(_list_of_prompts(prompts))]


def _list_of_prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    # A flat list of numbers is one prompt of token ids.
    return [prompts] if prompts and type(prompts[0]) is int else prompts


def _request(prompt: Any, number: int) -> TextRequest:
    text: Any = prompt
    tokens: Any = None
    if isinstance(prompt, Mapping):
        text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif isinstance(prompt, list | tuple):
        text, tokens = None, prompt
    if tokens is not None:
        return TextRequest(request_id=str(number), sampling=SamplingParams(), text=None, tokens=list(tokens))
    if not isinstance(text, str):
        raise RequestError(
            f"Prompt {number} is a {type(prompt).__name__}; it must be a text, {{'prompt': text}} or "
            "{'prompt_token_ids': ids}.",
            param="prompts",
        )
    return TextRequest(request_id=str(number), sampling=SamplingParams(), text=text)
