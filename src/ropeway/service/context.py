"""Prompt and answer against the model's context."""

from __future__ import annotations

from ropeway.errors import ContextLengthError, RequestError
from ropeway.service.params import FIT


def fit_max_tokens(prompt_len: int, max_model_len: int) -> int:
    """How many tokens an answer may have after `prompt_len` tokens; 0 or less if there is no room."""
    return max_model_len - prompt_len


def check_context(prompt_len: int, max_tokens: int, max_model_len: int) -> int:
    """The `max_tokens` to run with: as many as fit for `FIT`. Raises RequestError for an empty prompt and
    ContextLengthError if prompt and answer exceed the context; its beginning is the one that clients look for."""
    if prompt_len == 0:
        raise RequestError("The prompt is empty: it has no tokens. Send at least one.", param="prompt")
    room = fit_max_tokens(prompt_len, max_model_len)
    start = f"This model's maximum context length is {max_model_len} tokens."
    if room < 1:
        raise ContextLengthError(
            f"{start} However, your prompt has {prompt_len} tokens, which leaves no room for an answer. "
            f"Shorten it to at most {max_model_len - 1} tokens.",
            param="prompt",
        )
    if max_tokens == FIT:
        return room
    if max_tokens > room:
        raise ContextLengthError(
            f"{start} However, you requested {prompt_len + max_tokens} tokens ({prompt_len} in the prompt, "
            f"{max_tokens} for the answer). Shorten the prompt or lower max_tokens to {room}.",
            param="max_tokens",
        )
    return max_tokens
