"""When a sequence is done, as far as tokens can tell. (Stop strings live where text does.)"""

from __future__ import annotations

from ropeway.contract import FinishReason
from ropeway.scheduler.sequence import Sequence


def finish_after(seq: Sequence) -> FinishReason | None:
    """Whether the last token of `seq`, just appended, ends it. An end token wins over the length."""
    if seq.tokens[-1] in seq.ends and seq.output_len >= seq.request.sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(seq.tokens) >= seq.end else None


def stop_token(seq: Sequence) -> int | None:
    """The client's own stop token that ended `seq`, if one did (the model's end token does not count)."""
    last = seq.tokens[-1]
    ended = seq.finish is FinishReason.STOP and last in seq.request.sampling.stop_token_ids
    return last if ended and last not in seq.request.eos_ids else None
