"""Incremental decoding against the full decode of `tokenizers`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textkit import byte_level, gemma_style, llama_style, metaspace_style, stripped_style, word_piece

from ropeway.text.tokenizer import ByteTokenizer, HubTokenizer

MAKERS: list[Callable[[], HubTokenizer]] = [
    byte_level, llama_style, gemma_style, metaspace_style, stripped_style, word_piece,
]  # fmt: skip
KINDS = {make.__name__: make() for make in MAKERS}
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" thequickfox.é👩\u200d👧\ufffd")), max_size=40)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def deltas(tokenizer: HubTokenizer | ByteTokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    decoder = tokenizer.decoder(skip)
    found, at, turn = [], 0, 0
    while at < len(ids):
        size = cuts[turn % len(cuts)]
        found.append(decoder.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    pending, last = decoder.pending, decoder.flush()
    assert pending == bool(last)
    return [*found, last]


def full(tokenizer: HubTokenizer, ids: list[int], skip: bool) -> str:
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=TEXTS, cuts=CUTS, special=st.booleans(), skip=st.booleans())
def test_deltas_make_the_full_decode_of_any_text(
    kind: str, text: str, cuts: list[int], special: bool, skip: bool
) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, special)
    assert "".join(deltas(tokenizer, ids, cuts, skip)) == full(tokenizer, ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "word_piece"])
@settings(max_examples=150)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_deltas_make_the_full_decode_of_any_tokens(kind: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(deltas(tokenizer, ids, cuts, skip)) == full(tokenizer, ids, skip)


@pytest.mark.parametrize("kind", ["llama_style", "gemma_style", "metaspace_style", "stripped_style"])
@settings(max_examples=100)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_byte_fallback_deltas_make_the_full_decode_of_any_tokens(
    kind: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    """Except that `tokenizers` gives up a whole run of byte tokens for one wrong byte in it, which no stream can do:
    here an unfinished character stands alone. There is one U+FFFD for each of its bytes."""
    tokenizer = KINDS[kind]
    word = st.integers(259, tokenizer.vocab_size - 1).map(lambda i: [i])
    char = st.characters(codec="utf-8", min_codepoint=0x80).map(lambda c: [3 + b for b in c.encode()])
    broken = st.tuples(char.filter(lambda c: len(c) > 2), st.integers(1, 2), word).map(lambda t: t[0][: t[1]] + t[2])
    alone = broken.map(lambda b: [260, *b])
    pieces = data.draw(st.lists(st.one_of(word, word, char, st.just([1]), alone), max_size=20))
    ids = [i for piece in pieces for i in piece]
    assert "".join(deltas(tokenizer, ids, cuts, skip)) == full(tokenizer, ids, skip)


@settings(max_examples=100)
@given(text=TEXTS, cuts=CUTS)
def test_no_delta_ends_within_a_character(text: str, cuts: list[int]) -> None:
    tokenizer = ByteTokenizer()
    parts = deltas(tokenizer, tokenizer.encode(text, False), cuts, True)
    assert "".join(parts) == text
    assert parts[-1] == ""


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = KINDS["llama_style"]
    ids = tokenizer.encode("the fox", False)
    assert tokenizer.decoder(starts=True).push(ids) == "the fox"
    assert tokenizer.decoder(starts=False).push(ids) == " the fox"


@pytest.mark.parametrize("kind", ["byte_level", "llama_style"])
def test_a_hundred_thousand_wrong_bytes_take_linear_work(kind: str) -> None:
    """Counted in characters handled, not in seconds: each push returns what it added and holds three bytes at most."""
    tokenizer = KINDS[kind]
    wrong = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff")
    decoder = tokenizer.decoder()
    for _ in range(100_000):
        assert decoder.push((wrong,)) == "\ufffd"
        assert len(decoder._utf8.getstate()[0]) <= 3
