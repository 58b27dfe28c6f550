"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.build import template_kwargs
from ropeway.api.chat import prompt_ending
from ropeway.api.health import json_response
from ropeway.api.messages import parse_messages
from ropeway.api.parse import decode, ignored_header
from ropeway.api.schema import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from ropeway.api.state import api_of, read_body
from ropeway.contract import SamplingParams
from ropeway.errors import RequestError
from ropeway.service.request import TextRequest


async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation as the model would see it."""
    api = api_of(request)
    body, ignored = decode(TokenizeRequest, await read_body(request), {})
    api.check_model(body.model)
    text_request = prompt_only(body, str(request.state.request_id))
    tokens = await api.service.tokenize(text_request)
    strings = api.service.token_strings(tokens) if body.return_token_strs else None
    response = json_response(TokenizeResponse(len(tokens), api.service.max_model_len, tokens, strings))
    response.headers.update(ignored_header(ignored))
    return response


def prompt_only(body: TokenizeRequest, request_id: str) -> TextRequest:
    """What `body` asks for, as far as its tokens go. Raises RequestError unless it has either prompt or messages."""
    has_messages = bytes(body.messages).strip() not in (b"", b"null")
    if (body.prompt is None) != has_messages:
        raise RequestError("Send either prompt or messages.", param="prompt")
    what: dict[str, Any] = {"text": body.prompt}
    if has_messages:
        what = {
            "messages": parse_messages(body.messages),
            "template_kwargs": template_kwargs(body.chat_template_kwargs),
            **prompt_ending(body.add_generation_prompt, body.continue_final_message),
        }
    # vLLM adds the model's special tokens to plain text unless told otherwise; a rendered chat has its own.
    special = body.add_special_tokens if body.add_special_tokens is not None else not has_messages
    return TextRequest(request_id=request_id, sampling=SamplingParams(), add_special_tokens=special, **what)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    api = api_of(request)
    body, ignored = decode(DetokenizeRequest, await read_body(request), {})
    api.check_model(body.model)
    response = json_response(DetokenizeResponse(await api.service.detokenize(body.tokens)))
    response.headers.update(ignored_header(ignored))
    return response
