"""What a client asks for, after text has become tokens."""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop. Names and meanings are vLLM's.

    `top_k` 0 or -1 is off, `temperature` 0 is greedy. `seed` None lets the engine draw one at the door; the noise
    of the i-th output token is a function of (seed, i) alone: batching changes a seeded answer only by rounding logits.
    `stop` strings are matched on text by the service, everything else by scheduler and sampler.

    `logprobs` asks for the log probability of each output token and of that many of the likeliest ones beside it,
    `prompt_logprobs` for the same of the prompt's tokens; both are of the model's own logits, before anything below or
    above changes them. Only `allowed_token_ids` may be chosen if there are any. `bad_word_ids` are token sequences that
    must not be completed: the service makes them of `bad_words`. `grammar` (in llguidance's dialect of Lark,
    see `ropeway.text.grammar`) is what the output's text must follow; empty lets it be free.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""


class Urgency(IntEnum):
    """Who waits for the answer: a person now, somebody within minutes, or nobody for hours. What is not HIGH is
    background work: it rides in the seats and tokens that HIGH leaves free."""

    HIGH = 0
    MEDIUM = 1
    LOW = 2


class GenerateRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. `rid` is made by the service and unique per engine life.

    `eos_ids` are the model's end tokens (empty under `ignore_eos`). `salt` separates prefix caches of tenants.
    `priority`: lower is served earlier (vLLM's sense). `urgency` stands above that.
    `deadline_s` bounds the whole life, in seconds from arrival;
    `ttft_deadline_s` says when the first token is wanted, which the policy `deadline` works for.
    `cache` false keeps it out of the prefix cache: nothing is taken from there, nothing left there, so that every
    position is computed. `pooling` ("last", "mean", "cls") asks for a vector of the prompt instead of tokens: its one
    output token has no meaning. Of a prompt that is a pair of texts, `second` is where the second one begins, for
    models that mark the two apart; 0 if there is one text.
    """

    rid: int
    tokens: list[int]
    sampling: SamplingParams
    eos_ids: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    deadline_s: float | None = None
    ttft_deadline_s: float | None = None
    cache: bool = True
    pooling: str = ""
    second: int = 0
    urgency: Urgency = Urgency.HIGH
