"""Prompt and answer against the model's context."""

from __future__ import annotations

from ropeway.contract import ExecutorInfo
from ropeway.errors import ContextLengthError, RequestError
from ropeway.service.params import FIT
from ropeway.service.request import TextRequest


def check_context(prompt_len: int, max_tokens: int, max_model_len: int) -> int:
    """The `max_tokens` to run with: as many as fit for `FIT`. Raises RequestError for an empty prompt and
    ContextLengthError if prompt and answer exceed the context; its beginning is the one that clients look for."""
    if prompt_len == 0:
        raise RequestError("The prompt is empty: it has no tokens. Send at least one.", param="prompt")
    room = max_model_len - prompt_len
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


def check_input(count: int, max_model_len: int, param: str = "input") -> None:
    """Whether a vector can be made of `count` tokens: nothing is answered, so they may fill the context. Raises
    RequestError and ContextLengthError."""
    if count == 0:
        raise RequestError("The input is empty: it has no tokens. Send at least one.", param=param)
    if count > max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {count} tokens in "
            f"the input. Shorten it, or send truncate_prompt_tokens: {max_model_len}.",
            param=param,
        )


def reserve(request: TextRequest, prompt_len: int, sequences: int = 1) -> None:
    """Tell the request's meter, if there is one, what the engine is about to be asked for. Raises what that raises."""
    if request.meter is not None:
        most = request.sampling.max_tokens
        answer = None if most is None or most == FIT else most * sequences
        request.meter.reserve(prompt_len, answer)


def check_purpose(info: ExecutorInfo, pooling: str) -> None:
    """Raises RequestError if the model cannot do what is asked of it: to generate, or to make vectors."""
    able = info.pooling
    if pooling and able is None:
        message = f"{info.model} makes no vectors: it is served for generating text. Ask another model."
        raise RequestError(message, param="model")
    if not pooling and not info.generates:
        what, where = (
            ("scores pairs of texts", "/v1/score") if able and able.judges else ("makes vectors", "/v1/embeddings")
        )
        raise RequestError(f"{info.model} is an encoder: it {what} and generates no text. Use {where}.", param="model")
