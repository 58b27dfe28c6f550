"""What there is to share out, and what could never have a share."""

from __future__ import annotations

from dataclasses import dataclass

from ropeway.contract import GenerateRequest, Tier
from ropeway.errors import ContextLengthError, NeverFitsError, RequestError
from ropeway.kv import PreemptionMode


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What there is to share out, and which of the optional limits apply."""

    num_blocks: int
    block_size: int
    slots: int
    reserved_seats: int = 0
    max_model_len: int
    max_step_tokens: int
    prefix_caching: bool = True
    chunked_prefill: bool = True
    static_batching: bool = False
    secret: bytes = b"ropeway"
    tiers: tuple[Tier, ...] = ()
    tenant_quota: float = 1.0
    preemption_mode: PreemptionMode = "auto"
    background_gap: float | None = 0.0  # seconds; see `Backfill`


@dataclass
class Counters:
    """Totals since the start. Cache figures count tokens of first admissions."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0


def check_fits(request: GenerateRequest, res: Resources, pinned: int = 0) -> None:
    """Raises RequestError, ContextLengthError or NeverFitsError, with the numbers, if `request` could never run beside
    `pinned` blocks."""
    prompt, wanted = len(request.tokens), request.sampling.max_tokens
    if prompt < 1 or wanted < 1:
        raise RequestError(
            f"A request needs at least one prompt token and one token to generate, not {prompt} and {wanted}."
        )
    if prompt + (not request.pooling) > res.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {res.max_model_len} tokens. However, your prompt has {prompt} "
            "tokens, which leaves no room for an answer. Please shorten it."
        )
    total = min(prompt + wanted, res.max_model_len)
    needed = -(-total // res.block_size)
    room = res.num_blocks - pinned
    if needed > room:
        raise NeverFitsError(
            f"The request may grow to {total} tokens ({prompt} of prompt, {wanted} to generate), which needs "
            f"{needed} KV blocks of {res.block_size} tokens; this server has {res.num_blocks}"
            f"{f', {pinned} of them pinned' if pinned else ''}. Ask for at most "
            f"{max(0, room * res.block_size - prompt)} tokens, or raise --kv-cache-gib."
        )
    if not res.chunked_prefill and total > res.max_step_tokens:
        raise NeverFitsError(
            f"The request may grow to {total} tokens, but without chunked prefill all of a sequence must fit one "
            f"step of {res.max_step_tokens} tokens. Shorten it, or start with --enable-chunked-prefill."
        )
