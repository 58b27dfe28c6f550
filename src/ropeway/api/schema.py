"""The bodies that clients send, as types: what is written here is decoded, checked, and shown by /openapi.json.

msgspec decodes and checks in one pass in C, several times faster than pydantic, takes neither `true` nor `"1"` for a
number, and refuses NaN, infinity and numbers out of range. Every optional field may be null. Names and bounds are
OpenAI's; the extra ones are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct, field

from ropeway.api.limits import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_LABEL,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEQUENCES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPLATE_KWARGS,
)
from ropeway.api.loose import (
    Documents,
    FunctionCall,
    Functions,
    Messages,
    Prompt,
    ResponseFormat,
    StructuredOutputs,
    ToolChoice,
    Tools,
)
from ropeway.api.urgency import Tier, Word

_INT64 = 2**63
_INT32 = 2**31

Label = Annotated[str, Meta(max_length=MAX_LABEL)]
TokenId = Annotated[int, Meta(ge=0, lt=_INT32)]
Count = Annotated[int, Meta(ge=1, lt=_INT32)]
Milliseconds = Annotated[float, Meta(ge=1, le=86_400_000)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Priority = Annotated[int, Meta(ge=-_INT32, lt=_INT32)] | Word
PRIORITY = "A class: `high` (somebody waits), `medium` or `low`; or a number: inside a class, lower is served earlier."
DEFERRED = "Answer 202 with a job at once, and compute it in the background: see `/v1/jobs`."
CallbackUrl = Annotated[str, Meta(max_length=2048)]
CALLBACK = "Where the end of a deferred request, or of a response in the background, is announced."
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Struct, frozen=True):
    """`include_usage` adds a last chunk with the usage, `continuous_usage_stats` puts running usage on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Model = Annotated[str | None, Meta(description="A name from `/v1/models`; may be left out.")]
Temperature = Annotated[Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0: always the likeliest token.")]
TopP = Annotated[
    Annotated[float, Meta(ge=0, le=1)] | None,
    Meta(description="Draw from the fewest tokens that have this probability together."),
]


class CommonFields(Struct, frozen=True, kw_only=True):
    """What both generating endpoints take."""

    model: Model = None
    stream: Annotated[bool | None, Meta(description="Send the answer as server-sent events while it is made.")] = None
    stream_options: Annotated[
        StreamOptions | None,
        Meta(
            description="`include_usage`: usage in a last chunk; `continuous_usage_stats`: on each. With `stream` only."
        ),
    ] = None
    stream_interval: Annotated[
        Annotated[int, Meta(ge=1, lt=_INT32)] | None,
        Meta(description="At least so many tokens in each chunk of a stream but the first and the last."),
    ] = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | None,
        Meta(description="Answers to each prompt, which is computed once. Answer i has `seed` + i."),
    ] = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, lt=_INT32)] | None, Meta(description="Tokens that an answer may have.")
    ] = None
    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, lt=_INT32)] | None, Meta(description="Tokens before an answer may end.")
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, lt=_INT32)] | None,
        Meta(description="Draw from so many of the likeliest tokens; 0 or -1: from all."),
    ] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Draw from tokens at least so likely, relative to the likeliest."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None,
        Meta(
            description="The same seed gives the same answer while `system_fingerprint` is the same: in any batch if "
            "kernels are native."
        ),
    ] = None
    presence_penalty: Annotated[
        Penalty | None, Meta(description="Subtracted from the logits of tokens that the answer has.")
    ] = None
    frequency_penalty: Annotated[
        Penalty | None, Meta(description="Subtracted from a token's logit for each time that the answer has it.")
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=10)] | None,
        Meta(description="Divides the logits of tokens in prompt or answer (multiplies negative ones)."),
    ] = None
    logit_bias: Annotated[
        Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None,
        Meta(description="Token ids and what is added to their logits."),
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None,
        Meta(description="No other token is ever chosen."),
    ] = None
    bad_words: Annotated[
        Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None,
        Meta(description="Texts whose tokens never follow each other in an answer."),
    ] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None,
        Meta(description="Texts at which an answer ends."),
    ] = None
    stop_token_ids: Annotated[
        Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None,
        Meta(description="Tokens at which an answer ends."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, Meta(description="Leave the stop string or stop token in the answer.")
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="The model's own end token does not end an answer.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the answer's text (default: true).")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Let the tokenizer add its marks to the prompt (default: to text, not to conversations)."),
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, lt=_INT32)] | None,
        Meta(description="Keep at most so many tokens of the prompt; -1: as many as the context has room for."),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        Meta(description="Which side of the prompt `truncate_prompt_tokens` takes away (default: left)."),
    ] = None
    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description="Log probabilities of the prompt's tokens, with so many alternatives each."),
    ] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="Add `prompt_token_ids` and `token_ids` to the answer.")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="Write tokens in log probabilities as `token_id:ID`.")
    ] = None
    structured_outputs: StructuredOutputs = field(default_factory=Raw)
    response_format: ResponseFormat = field(default_factory=Raw)
    use_beam_search: Annotated[
        bool | None, Meta(description="Search the `n` likeliest answers instead of drawing. Not with `stream`.")
    ] = None
    length_penalty: Annotated[
        Annotated[float, Meta(ge=-10, le=10)] | None,
        Meta(description="Beam search divides log probabilities by length to this power (default: 1)."),
    ] = None
    echo: Annotated[
        bool | None,
        Meta(description="Put the prompt before the answer; in a chat, the last message that is continued."),
    ] = None
    priority: Annotated[Priority | None, Meta(description=PRIORITY)] = None
    service_tier: Annotated[
        Tier | None,
        Meta(description="`flex` is the class `medium`, `batch` is `low`; `priority` goes first in `high`. Echoed."),
    ] = None
    deferred: Annotated[bool | None, Meta(description=DEFERRED)] = None
    background: Annotated[bool | None, Meta(description="Another word for `deferred`.")] = None
    callback_url: Annotated[CallbackUrl | None, Meta(description=CALLBACK)] = None
    deadline_ms: Annotated[
        Milliseconds | None, Meta(description="Time for the whole answer, after which it ends with a timeout.")
    ] = None
    ttft_deadline_ms: Annotated[
        Milliseconds | None,
        Meta(description="When the first token is wanted: what the scheduling policy `deadline` works for."),
    ] = None
    cache_salt: Annotated[
        Label | None, Meta(description="Requests share cached prefixes only with requests of the same salt.")
    ] = None
    request_id: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")] | None,
        Meta(description="The answer's `id` ends with it, and `/v1/requests` finds it by that."),
    ] = None


class ChatCompletionRequest(CommonFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[
        Count | None, Meta(description="Wins over `max_tokens`. Default: as many as the context allows.")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="Log probabilities of the answer's tokens.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description="Alternatives shown with each token's log probability. With `logprobs` only."),
    ] = None
    tools: Tools = field(default_factory=Raw)
    tool_choice: ToolChoice = field(default_factory=Raw)
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether an answer may have several calls (default: true).")
    ] = None
    functions: Functions = field(default_factory=Raw)
    function_call: FunctionCall = field(default_factory=Raw)
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End the prompt with the opening of an answer (default: true).")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Go on with the last message instead of opening another.")
    ] = None
    chat_template_kwargs: Annotated[
        Annotated[dict[Label, Raw], Meta(max_length=MAX_TEMPLATE_KWARGS)] | None,
        Meta(description="Plain values for the chat template to read."),
    ] = None
    documents: Documents = field(default_factory=Raw)
    reasoning_effort: Annotated[
        Label | None,
        Meta(description="For templates that read it; `none` also clears `enable_thinking`, where that is read."),
    ] = None
    include_reasoning: Annotated[
        bool | None, Meta(description="Leave the model's reasoning in the answer (default: true).")
    ] = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Meta(description="For templates that read it.")] = (
        None
    )


class CompletionRequest(CommonFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions. `max_tokens` is 16 unless given."""

    prompt: Prompt
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description="Log probabilities of the answer's tokens, with so many alternatives each."),
    ] = None
    best_of: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | None,
        Meta(description="Make so many answers, return the `n` with the best mean log probability. Not with `stream`."),
    ] = None


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages = field(default_factory=Raw)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[Label, Raw], Meta(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    return_token_strs: bool | None = None


class PinRequest(TokenizeRequest, frozen=True, kw_only=True):
    """Body of PUT /admin/pins/{name}: either `prompt` or `messages`, and whose requests begin so."""

    tenant: Annotated[
        Label | None, Meta(description="Whose requests: a tenant header's value, or 16 hex digits of a key's SHA-256.")
    ] = None
    cache_salt: Annotated[Label | None, Meta(description="The salt that those requests send.")] = None


class PinState(Struct, frozen=True):
    """A prefix that stays cached: its tokens in whole KV blocks, and how many of these are there now."""

    name: str
    tokens: int
    blocks: int
    cached: int


class PinList(Struct, frozen=True):
    """All prefixes that stay cached."""

    pins: list[PinState]


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class UsageBody(Struct, frozen=True):
    """Tokens read and written. A prompt that is answered `n` times counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ropeway"
    root: str
    parent: str | None = None
    max_model_len: int | None


class ModelList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct, frozen=True):
    prompt: str


class Readiness(Struct, frozen=True, omit_defaults=True):
    """`reasons` is empty when the server takes requests. `degraded` says what does not work as it should meanwhile."""

    ready: bool
    state: str
    reasons: list[str]
    degraded: list[str] = []


class Version(Struct, frozen=True):
    version: str


class SchedulerChange(Struct, frozen=True, kw_only=True):
    """Body of PUT /admin/scheduler."""

    policy: Annotated[Label, Meta(min_length=1, description="A value of --scheduling-policy.")]


class SchedulerState(Struct, frozen=True):
    """By which policy requests board, and how many wait."""

    policy: str
    waiting: int


class WaitState(Struct, frozen=True):
    """Why a request waits, with the engine's own number for it: `position` is its place in the line (1 = next),
    `held_by` a limit or the scheduling policy, or empty if it boards with the next step. It is expected to board in
    `eta_seconds`; null: too early to tell."""

    request: int
    position: int
    held_by: str
    reason: str
    eta_seconds: float | None


class QueueState(Struct, frozen=True):
    """Who waits, next first. `eta_error` is the mean of |estimated wait - wait| / wait of those who boarded lately."""

    waiting: list[WaitState]
    eta_error: float | None


class Load(Struct, frozen=True, kw_only=True):
    """`server_load` counts the generating requests that are being answered. The rest is the engine's: sequences that
    run and wait, its seats, and the share of its KV blocks in use, 0 to 1."""

    server_load: int
    running: int
    waiting: int
    seats: int
    kv_cache_usage: float
