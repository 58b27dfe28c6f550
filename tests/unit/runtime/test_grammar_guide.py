"""Masks for sequences that follow grammars, without a model."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import llguidance
import numpy as np
import pytest
from numpy.typing import NDArray

from ropeway.contract import SamplingParams
from ropeway.errors import EngineError, RequestError, RopewayError
from ropeway.runtime.grammar import Grammars
from ropeway.runtime.sampler import Want
from ropeway.runtime.slots import Slot
from ropeway.text import grammar_worker
from ropeway.text.grammar import from_lark, from_structured_outputs, vocabulary
from ropeway.text.tokenizer import ByteTokenizer

BOS, END, VOCAB = ByteTokenizer.BOS, ByteTokenizer.EOS, 300
PROMPT = [BOS, 1, 2]


@pytest.fixture(params=[1, 2])
def guide(request: pytest.FixtureRequest) -> Grammars:
    return Grammars(lambda: vocabulary(ByteTokenizer(), [END], VOCAB), threads=request.param)


class Row:
    """A sequence on board."""

    def __init__(self, grammar: str, output: bytes = b"", **sampling: object) -> None:
        wishes = SamplingParams(grammar=grammar, **sampling)  # type: ignore[arg-type]
        self.tokens = [*PROMPT, *output]
        self.seat = Slot(
            rid=1, epoch=1, prompt_len=len(PROMPT), known=len(self.tokens), blocks=0, sampling=wishes, eos_ids=(END,),
            seed=0,
        )  # fmt: skip

    @property
    def want(self) -> Want:
        return Want(self.seat, np.array(self.tokens, dtype=np.int32))


def allowed(masks: Sequence[NDArray[np.uint32] | RopewayError | None]) -> list[set[int] | Exception]:
    """The tokens of each."""
    found: list[set[int] | Exception] = []
    for mask in masks:
        if isinstance(mask, Exception):
            found.append(mask)
        else:
            assert mask is not None
            assert mask.dtype == np.uint32 and mask.shape == (-(-VOCAB // 32),) and mask.flags.c_contiguous  # noqa: PT018
            found.append(set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()))
    return found


def step(guide: Grammars, *rows: Row) -> list[set[int] | Exception]:
    """What may come next in each row."""
    wants = [row.want for row in rows]
    guide.begin(wants)
    return allowed(guide.masks(wants))


def test_rows_are_led_to_their_ends(guide: Grammars) -> None:
    rows = [Row(from_lark('start: "ab" | "ac" "d"?')), Row(from_structured_outputs({"choice": ["b", "ba"]}))]
    assert step(guide, *rows) == [{ord("a")}, {ord("b")}]
    for row, token in zip(rows, b"ab", strict=True):
        row.tokens.append(token)
    assert step(guide, *rows) == [{ord("b"), ord("c")}, {ord("a"), END}]
    for row, token in zip(rows, b"ba", strict=True):
        row.tokens.append(token)
    assert step(guide, *rows) == [{END}, {END}]
    for row in rows:
        row.tokens.append(END)  # and does not end, because the request has another end token
    assert step(guide, *rows) == [{END}, {END}]


def test_a_row_that_boards_again_has_come_as_far_as_before(guide: Grammars) -> None:
    grammar = from_structured_outputs({"regex": "[ab]{3}c"})
    first, second = Row(grammar), Row(grammar, b"aba")
    assert step(guide, first, second) == [{ord("a"), ord("b")}, {ord("c")}]
    third = Row(grammar, b"abac")
    first.tokens.append(ord("b"))
    assert step(guide, third, first) == [{END}, {ord("a"), ord("b")}]


def test_masks_may_be_asked_for_in_parts(guide: Grammars) -> None:
    rows = [Row(from_lark(f'start: "{letter}"')) for letter in "xyz"]
    wants = [row.want for row in rows]
    guide.begin(wants)
    parts = [*guide.masks(wants[:1]), *guide.masks(wants[1:])]
    assert allowed(parts) == [{ord(letter)} for letter in "xyz"]


def test_special_and_missing_tokens_are_no_text(guide: Grammars) -> None:
    (found,) = step(guide, Row(from_lark("start: A\nA: /(?s:.)+/")))
    assert isinstance(found, set)
    assert found == set(range(0x80)) | set(range(0xC2, 0xF5))  # the bytes that UTF-8 may begin with


def test_special_tokens_can_be_asked_for(guide: Grammars) -> None:
    row = Row(from_lark('start: <[256]> "a" <[257]>'))
    for token in (BOS, ord("a"), END):
        assert step(guide, row) == [{token}]
        row.tokens.append(token)


def test_ignore_eos_goes_on_as_long_as_the_grammar_does(guide: Grammars) -> None:
    row = Row(from_structured_outputs({"regex": "a{0,2}"}), ignore_eos=True)
    for expected in ({ord("a")}, {ord("a")}, {END}):
        assert step(guide, row) == [expected]
        row.tokens.append(ord("a"))


def test_what_is_wrong_with_one_row_is_its_own(guide: Grammars) -> None:
    astray, broken, sound = Row(from_lark('start: "a"'), b"x"), Row(from_lark("start: (")), Row(from_lark('start: "b"'))
    found = step(guide, astray, broken, sound)
    assert isinstance(found[0], RequestError)
    assert isinstance(found[1], RequestError)
    assert found[2] == {ord("b")}
    assert step(guide, broken, sound)[1:] == [{ord("b")}]


def test_a_vocabulary_that_cannot_be_read_fails_the_row_alone() -> None:
    def words() -> tuple[list[bytes], list[int], list[int]]:
        raise RuntimeError("no file")

    (found,) = step(Grammars(words), Row(from_lark('start: "a"')))
    assert isinstance(found, EngineError)
    assert "no file" in str(found)


def test_a_model_without_an_end_is_told() -> None:
    (found,) = step(Grammars(lambda: ([b"a"], [], [])), Row(from_lark('start: "a"')))
    assert isinstance(found, RequestError)
    assert "end token" in str(found)


@pytest.fixture
def narrow() -> Iterator[None]:
    """A limit on states that one answer keeps, but not all of them together."""
    with patch.object(
        grammar_worker, "limits", lambda: llguidance.LLParserLimits(max_lexer_states=60, verbose_errors=False)
    ):
        yield


@pytest.mark.usefixtures("narrow")
def test_what_others_have_made_of_a_grammar_harms_nobody(guide: Grammars) -> None:
    grammar = from_structured_outputs({"regex": "|".join(f"{letter}[a-z]{{10}}{letter}" for letter in "abcdef")})
    for text in (bytes([letter]) * 11 for letter in b"abcdef"):
        row = Row(grammar)
        for token in text:
            (found,) = step(guide, row)
            assert isinstance(found, set), found
            assert token in found
            row.tokens.append(token)
        assert step(guide, row) == [{text[0]}]


@pytest.mark.usefixtures("narrow")
def test_a_grammar_that_grows_beyond_its_limit_ends_its_own_row(guide: Grammars) -> None:
    hungry, modest = Row(from_structured_outputs({"regex": ".*a.{12}"})), Row(from_structured_outputs({"regex": "b*"}))
    draw = random.Random(0)
    for _ in range(200):
        found = step(guide, hungry, modest)
        assert found[1] == {ord("b"), END}
        if isinstance(found[0], RequestError):
            assert "any further" in str(found[0])
            return
        hungry.tokens.append(draw.choice(b"ab"))  # each time another history of the last twelve
        modest.tokens.append(ord("b"))
    raise AssertionError("it never reached its limit")


def test_equal_grammars_are_compiled_once_and_the_step_does_not_wait_for_them() -> None:
    gate = threading.Event()

    def words() -> tuple[list[bytes], list[int], list[int]]:
        if not gate.wait(60):
            raise AssertionError("begin() waits for the vocabulary")
        return vocabulary(ByteTokenizer(), [END], VOCAB)

    guide = Grammars(words)
    rows = [Row(from_lark('start: "a"')) for _ in range(3)]
    wants = [row.want for row in rows]
    with patch.object(grammar_worker, "compiled", wraps=grammar_worker.compiled) as compiled:
        guide.begin(wants)  # returns although nothing can be compiled yet
        gate.set()
        found = guide.masks(wants)
    assert allowed(found) == [{ord("a")}] * 3
    assert compiled.call_count == 1
