"""The bounds of sampling parameters."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ropeway.contract import SamplingParams
from ropeway.errors import RequestError
from ropeway.service.params import (
    FIT,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    validate,
    with_bad_words,
    with_max_tokens,
)
from ropeway.text.tokenizer import ByteTokenizer

NAN, INF, BIG = float("nan"), float("inf"), 2**63
NUMBERS = [True, "1", None, [], NAN, INF, -INF]
WRONG: dict[str, list[Any]] = {
    "temperature": [*NUMBERS, -0.1, 101],
    "top_p": [*NUMBERS, 0, -1, 1.01],
    "min_p": [*NUMBERS, -0.01, 1.01],
    "presence_penalty": [*NUMBERS, -2.1, 2.1],
    "frequency_penalty": [*NUMBERS, -2.1, 2.1],
    "repetition_penalty": [*NUMBERS, 0, -1, 10.1, 10**400],
    "top_k": [*NUMBERS, -2, BIG, 1.5],
    "seed": [True, "1", [], NAN, 1.5, BIG, -BIG - 1],
    "max_tokens": [True, "1", [], NAN, 0, -2, BIG],
    "min_tokens": [*NUMBERS, -1, 17, BIG],
    "stop": ["", [""], [1], 3, ["x"] * (MAX_STOPS + 1), "x" * (MAX_STOP_CHARS + 1), [None]],
    "stop_token_ids": [3, [True], [-1], [100], ["1"], [1.0], list(range(2000))],
    "logit_bias": [3, [1], {100: 1.0}, {-1: 1.0}, {"x": 1}, {"²": 1}, {1: 101}, {1: NAN}, {1: True}, {1.0: 1},
                   dict.fromkeys(range(MAX_BIASES + 1), 1.0)],
    "include_stop_str_in_output": [1, "true", None],
    "ignore_eos": [0, None],
    "skip_special_tokens": ["no", None],
    "logprobs": [True, "1", [], NAN, 1.0, -1, 21, BIG],
    "prompt_logprobs": [True, "1", [], NAN, 1.0, -1, 21, BIG],
    "allowed_token_ids": [[], 3, [True], [-1], [100], ["1"], [1.0]],
    "bad_words": ["", [""], [1], 3, ["x"] * (MAX_BAD_WORDS + 1), "x" * (MAX_STOP_CHARS + 1), [None]],
    "grammar": [None, 3, ["x"]],
    "bad_word_ids": [None, 3, [3], [0], [[]], [[100]], [["1"]], [[1], [-1]]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_out_of_bounds_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        validate(SamplingParams(**{name: value}), vocab_size=100)
    assert caught.value.param == name
    assert len(str(caught.value)) < 300


def test_every_field_has_wrong_values_here() -> None:
    assert set(WRONG) == set(SamplingParams.__struct_fields__)


def test_habits_are_understood_and_types_become_those_of_the_contract() -> None:
    loose: Any = {
        "stop": "x",
        "stop_token_ids": [1, 1, 2],
        "logit_bias": {"3": 1},
        "max_tokens": None,
        "temperature": 1,
    }
    checked = validate(SamplingParams(**loose), vocab_size=100)
    assert checked == SamplingParams(stop=("x",), stop_token_ids=(1, 2), logit_bias={3: 1.0}, max_tokens=FIT)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(checked), type=SamplingParams) == checked
    empty: Any = dict.fromkeys(("stop", "stop_token_ids", "logit_bias", "bad_words", "allowed_token_ids"))
    assert validate(SamplingParams(**empty)) == validate(SamplingParams()) == SamplingParams()


def test_the_room_replaces_only_an_open_max_tokens() -> None:
    assert with_max_tokens(SamplingParams(max_tokens=FIT, min_tokens=9), 5) == SamplingParams(
        max_tokens=5, min_tokens=5
    )
    assert with_max_tokens(SamplingParams(max_tokens=3), 5).max_tokens == 3


def test_a_bad_word_is_bad_at_the_beginning_and_after_a_space() -> None:
    wish = validate(SamplingParams(bad_words="ab", bad_word_ids=((1, 2),)), max_logprobs=0)  # type: ignore[arg-type]
    found = with_bad_words(wish, ByteTokenizer().encode)
    assert found.bad_word_ids == ((1, 2), tuple(b"ab"), tuple(b" ab"))
    assert (
        with_bad_words(SamplingParams(bad_words=(" ab",)), ByteTokenizer().encode).bad_word_ids
        == found.bad_word_ids[1:]
    )
    with pytest.raises(RequestError, match="words that have tokens"):
        with_bad_words(wish, lambda text, special: [])


def test_how_many_log_probabilities_may_be_asked_for_is_the_operators_to_say() -> None:
    assert validate(SamplingParams(logprobs=20, prompt_logprobs=0)).logprobs == 20
    assert validate(SamplingParams(logprobs=50), max_logprobs=50).logprobs == 50
    with pytest.raises(RequestError, match="from 0 to 5"):
        validate(SamplingParams(logprobs=6), max_logprobs=5)
