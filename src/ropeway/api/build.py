"""From a checked body to the sequences that the service is asked for."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from ropeway.api.errors import HttpError
from ropeway.api.limits import MAX_SEQUENCES
from ropeway.api.making import Choice
from ropeway.api.parse import decode_field, left_out
from ropeway.api.schema import CommonFields
from ropeway.api.state import Api
from ropeway.api.urgency import place_of, urgency_of
from ropeway.contract import SamplingParams, Urgency
from ropeway.errors import RequestError
from ropeway.service.request import TextRequest
from ropeway.text.grammar import from_response_format, from_structured_outputs

_SEED_SPAN = 2**63
_KWARG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# What a template renderer takes for itself; a request that could set these would change which template runs, or how.
_RESERVED_KWARGS = frozenset(
    {
        "chat_template", "tokenize", "messages", "conversation", "tools", "documents", "add_generation_prompt",
        "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
_MAX_KWARG_TEXT = 4096
Scalar = bool | int | float | str | None


def answer_id(prefix: str, name: str | None = None) -> str:
    """A new id, or one that ends with the `name` that the client chose."""
    return f"{prefix}-{name or secrets.token_hex(16)}"


def check_together(body: CommonFields) -> None:
    """Refuse fields that have no meaning beside each other. Raises RequestError."""
    options = body.stream_options
    if options is not None and not body.stream:
        raise RequestError("stream_options can only be given together with stream: true.", param="stream_options")
    if body.truncation_side is not None and body.truncate_prompt_tokens is None:
        message = "truncation_side can only be given together with truncate_prompt_tokens."
        raise RequestError(message, param="truncation_side")
    if body.length_penalty is not None and not body.use_beam_search:
        message = "length_penalty can only be given together with use_beam_search: true."
        raise RequestError(message, param="length_penalty")


def service_tier(body: CommonFields) -> Any:
    """The tier to answer with; None if the request did not ask for one."""
    return "default" if body.service_tier == "auto" else body.service_tier


def form_of(body: CommonFields) -> str:
    """The grammar that the whole answer must follow; empty if it is free. Raises RequestError."""
    found = [
        translate(decode_field(raw, dict[str, Any], name))
        for name, raw, translate in (
            ("response_format", body.response_format, from_response_format),
            ("structured_outputs", body.structured_outputs, from_structured_outputs),
        )
        if not left_out(raw)
    ]
    if len(found) == 2 and all(found):
        message = "response_format and structured_outputs both say what the answer follows. Send one of them."
        raise RequestError(message, param="structured_outputs")
    return "".join(found)


def sampling_params(
    body: CommonFields, max_tokens: int, defaults: SamplingParams, *, logprobs: int | None = None
) -> SamplingParams:
    """The sampling fields; `defaults` hold for whatever is missing or null."""

    def given(**fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not None}

    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    # top_p 0 means that only the likeliest token remains; a positive bound says the same without a special case.
    top_p = max(body.top_p, 1e-9) if body.top_p is not None else None
    return msgspec.structs.replace(
        defaults,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        **given(
            temperature=body.temperature,
            top_p=top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=body.logit_bias,
            min_tokens=body.min_tokens,
            include_stop_str_in_output=body.include_stop_str_in_output,
            ignore_eos=body.ignore_eos,
            skip_special_tokens=body.skip_special_tokens,
        ),
    )


def fan_out(
    request: Request,
    api: Api,
    body: CommonFields,
    sampling: SamplingParams,
    prompts: Sequence[Mapping[str, Any]],
    param: str,
    *,
    count: int,
    **choice: Any,
) -> list[Choice]:
    """`count` choices for each prompt, in the order of the answer's indexes; `prompts` are fields of `TextRequest`, and
    `choice` of `Choice`.

    Choice i of a prompt gets seed + i, so that it does not depend on the other prompts. Raises HttpError (400).
    """
    if count * len(prompts) > MAX_SEQUENCES:
        message = f"{len(prompts)} prompts times n={count} is more than {MAX_SEQUENCES} answers. Split the request."
        raise HttpError(400, message, param="n" if count > 1 else param)
    ttft_deadline_ms = body.ttft_deadline_ms or api.config.ttft_deadline_ms
    urgency = urgency_of(request, body.priority, body.service_tier)
    priority = place_of(body.priority)
    if body.priority is None and body.service_tier == "priority":
        priority = api.service.default_priority - 1
    truncate = body.truncate_prompt_tokens
    if truncate == -1:
        truncate = api.service.max_model_len - max(sampling.max_tokens, 1)
    choices: list[Choice] = []
    for number, prompt in enumerate(prompts):
        for i in range(count):
            seed = sampling.seed
            if seed is not None and i:
                seed = (seed + i + _SEED_SPAN) % (2 * _SEED_SPAN) - _SEED_SPAN
            text_request = TextRequest(
                request_id=str(request.state.request_id),
                sampling=msgspec.structs.replace(sampling, seed=seed) if i else sampling,
                add_special_tokens=body.add_special_tokens,
                priority=priority,
                urgency=urgency,
                tenant=str(request.state.tenant),
                meter=request.state.meter,
                trace=str(request.state.trace),
                salt=body.cache_salt or "",
                deadline_s=deadline(api, urgency, body.deadline_ms),
                ttft_deadline_s=ttft_deadline_ms / 1000 if ttft_deadline_ms else None,
                truncate=truncate,
                truncate_left=body.truncation_side != "right",
                **prompt,
            )
            interval = body.stream_interval or 1
            choices.append(Choice(text_request, len(choices), number, interval=interval, **choice))
    return choices


def deadline(api: Api, urgency: Urgency, asked_ms: float | None) -> float | None:
    """Seconds for a whole answer: what the request allows, and what the server does where somebody waits."""
    bounds = [] if asked_ms is None else [asked_ms / 1000]
    if urgency is Urgency.HIGH:
        bounds.append(api.config.request_timeout)
    return min(bounds, default=None)


def template_kwargs(raw: Mapping[str, msgspec.Raw] | None, where: str = "chat_template_kwargs") -> dict[str, Any]:
    """Arguments for the chat template: plain values under names that the renderer does not use itself."""
    kwargs: dict[str, Any] = {}
    for name, value in (raw or {}).items():
        param = f"{where}.{name}" if _KWARG_NAME.fullmatch(name) else where
        if param == where:
            raise RequestError("Names of chat template arguments are letters, digits and underscores.", param=where)
        if name in _RESERVED_KWARGS:
            raise RequestError(f"The chat template argument '{name}' cannot be set by a request.", param=param)
        decoded = decode_field(value, Scalar, param)
        if isinstance(decoded, str) and len(decoded) > _MAX_KWARG_TEXT:
            message = f"The chat template argument '{name}' is longer than {_MAX_KWARG_TEXT} characters."
            raise RequestError(message, param=param)
        kwargs[name] = decoded
    return kwargs
