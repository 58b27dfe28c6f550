"""Who is refused at the door: exactly those who could never run, with the numbers; and how those who ran have ended."""

from __future__ import annotations

from typing import Any

import pytest
from desk import request, sequence
from hypothesis import example, given
from hypothesis import strategies as st

from ropeway.contract import ErrorInfo, FinishReason
from ropeway.errors import ContextLengthError, NeverFitsError, RequestError
from ropeway.scheduler import Counters, Resources
from ropeway.scheduler.resources import check_fits
from ropeway.scheduler.sequence import Sequence, State
from ropeway.scheduler.stops import final_event, finish_after


def resources(**changes: Any) -> Resources:
    fields: dict[str, Any] = {"num_blocks": 10, "block_size": 4, "slots": 2, "max_model_len": 24, "max_step_tokens": 16}
    return Resources(**fields | changes)


@given(
    prompt=st.integers(0, 30), answer=st.integers(0, 30), blocks=st.integers(1, 9), pinned=st.integers(0, 3),
    pooling=st.booleans(), in_parts=st.booleans(),
)  # fmt: skip
@example(1, 1, 1, 0, False, True)
@example(0, 1, 9, 0, False, True)
@example(1, 0, 9, 0, False, True)
@example(24, 1, 9, 0, True, True)
@example(24, 1, 9, 0, False, True)
@example(23, 1, 9, 0, False, True)
@example(25, 1, 9, 0, True, True)
@example(8, 16, 6, 0, False, True)
@example(8, 16, 6, 1, False, True)
@example(8, 13, 9, 3, False, True)
@example(8, 8, 9, 0, False, False)
@example(8, 9, 9, 0, False, False)
def test_what_is_refused_is_what_could_never_run(
    prompt: int, answer: int, blocks: int, pinned: int, pooling: bool, in_parts: bool
) -> None:
    expected: type[Exception] | None = None
    whole = min(prompt + answer, 24)
    if prompt == 0 or answer == 0:
        expected = RequestError
    elif prompt > 24 or (prompt == 24 and not pooling):
        expected = ContextLengthError
    elif whole > 4 * (blocks - pinned) or (whole > 16 and not in_parts):
        expected = NeverFitsError
    found: type[Exception] | None = None
    try:
        check_fits(
            request(7, prompt, answer, pooling="last" if pooling else ""),
            resources(num_blocks=blocks, chunked_prefill=in_parts), pinned,
        )  # fmt: skip
    except RequestError as error:
        found = type(error)
    assert found is expected


@pytest.mark.parametrize(("asked", "changes", "pinned", "words"), [
    ((0, 3), {}, 0, "at least one prompt token and one token to generate, not 0 and 3."),
    ((30, 3), {}, 0, "context length is 24 tokens. However, your prompt has 30 tokens"),
    ((9, 13), {"num_blocks": 5}, 0, "grow to 22 tokens (9 of prompt, 13 to generate), which needs 6 KV blocks of 4 "
        "tokens; this server has 5. Ask for at most 11 tokens, or raise --kv-cache-gib."),
    ((9, 13), {"num_blocks": 7}, 2, "this server has 7, 2 of them pinned. Ask for at most 11 tokens"),
    ((9, 13), {"num_blocks": 3}, 2, "Ask for at most 0 tokens"),
    ((9, 8), {"chunked_prefill": False}, 0, "grow to 17 tokens, but without chunked prefill all of a sequence must fit "
        "one step of 16 tokens"),
])  # fmt: skip
def test_who_is_refused_is_told_the_numbers(
    asked: tuple[int, int], changes: dict[str, Any], pinned: int, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_fits(request(7, *asked), resources(**changes), pinned)
    assert words in caught.value.message


def test_defaults() -> None:
    check_fits(request(7, 9, 15), resources(num_blocks=6))  # nothing is pinned
    assert resources() == resources(
        reserved_seats=0, prefix_caching=True, chunked_prefill=True, static_batching=False, tiers=(), tenant_quota=1.0,
        preemption_mode="auto", background_gap=0.0,
    )  # fmt: skip
    assert Counters() == Counters(
        prompt_tokens=0, generation_tokens=0, cache_queries=0, cache_hits=0, preemptions=0
    )  # fmt: skip


def test_a_sequence_ends_by_length_or_at_the_end_of_the_context() -> None:
    assert [finish_after(sequence_of(4, 3), length) for length in (5, 6, 7)] == [None, None, FinishReason.LENGTH]
    assert sequence(1, 4, 90, longest=10).end == 10
    assert sequence(1, 10, 1, longest=10, pooling="last").end == 11, "its one token means nothing and needs no place"


def sequence_of(prompt: int, answer: int, **sampling: Any) -> Sequence:
    seq = sequence(7, prompt, answer, sampling=sampling)
    seq.tokens += [5] * answer
    return seq


def test_a_sequence_shares_what_is_cached_unless_there_is_no_cache_or_it_wants_none() -> None:
    assert [sequence().shares, sequence(cache=False).shares] == [True, False]
    assert not Sequence(request(7), 1, 2.0, 100, caching=False).shares


def test_an_end_token_wins_over_the_length_but_not_over_the_minimum() -> None:
    seq = sequence_of(4, 3, stop_token_ids=(5,), min_tokens=2)
    found = [finish_after(seq, length) for length in (5, 6, 7)]
    assert found == [None, FinishReason.STOP, FinishReason.STOP]
    model = sequence(7, 4, 3, eos_ids=(9,))
    model.tokens += [9]
    assert finish_after(model, 5) is FinishReason.STOP


def test_the_last_news_says_what_a_request_has_cost() -> None:
    seq = sequence(7, 4, 3, 2.0, sampling={"stop_token_ids": (5, 9)}, eos_ids=(9,))
    fresh = final_event(seq, 9.0, None, []).usage
    assert fresh is not None
    assert (fresh.first_token_s, fresh.cached_tokens) == (None, 0)
    seq.tokens += [8, 5]
    seq.cached, seq.preemptions, seq.first_scheduled, seq.first_token, seq.finish = 2, 1, 2.5, 4.0, FinishReason.STOP
    event = final_event(seq, 9.0, None, [5])
    usage = event.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.preemptions) == (4, 2, 2, 1)
    assert (usage.first_scheduled_s, usage.first_token_s, usage.total_s) == (0.5, 2.0, 7.0)
    assert (event.rid, event.tokens, event.cached_tokens, event.finish) == (7, [5], 2, FinishReason.STOP)
    assert event.stop_token == 5
    seq.finish = FinishReason.LENGTH
    assert final_event(seq, 9.0, None, [5]).stop_token is None, "it did not end it"
    seq.finish, seq.tokens[-1] = FinishReason.STOP, 9
    assert final_event(seq, 9.0, None, [9]).stop_token is None, "the model's own end is no client's"
    seq.tokens[-1] = 8
    assert final_event(seq, 9.0, None, [8]).stop_token is None, "a string of the client's has ended it"
    error = ErrorInfo("RW-X", "why")
    assert final_event(seq, 9.0, error, []).error is error


def test_a_vector_s_one_token_means_nothing() -> None:
    seq = sequence(7, 4, 1, pooling="last")
    seq.tokens += [8]
    event = final_event(seq, 9.0, None, [8])
    assert event.tokens == []
    assert event.usage is not None
    assert event.usage.completion_tokens == 0


def test_a_sequence_moves_as_it_may() -> None:
    seq = sequence(7)
    for state in (State.RUNNING, State.QUEUED, State.RUNNING, State.FINISHED):
        seq.move(state)
        with pytest.raises(RuntimeError, match=f"request 7 cannot go from {state.value} to {state.value}"):
            seq.move(state)
    with pytest.raises(RuntimeError):
        seq.move(State.QUEUED)
    assert [state.value for state in State] == ["queued", "running", "finished"]
