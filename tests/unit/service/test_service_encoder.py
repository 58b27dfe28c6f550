"""Prompts that are cut: what is left is what a cut of the whole prompt's tokens leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.contract import SamplingParams
from ropeway.errors import ContextLengthError
from ropeway.hub import BUNDLED
from ropeway.service.context import check_context
from ropeway.service.encoder import Encoder
from ropeway.service.encoder import cut as cut_tokens
from ropeway.service.request import TextRequest
from ropeway.text.tokenizer import HubTokenizer

TOKENIZER = HubTokenizer.load(BUNDLED)
WORDS = st.sampled_from(
    ["the", "Sea", "story,", "é", "中文", "\n\n", "  ", "12345", "http://x.y/z", "👩‍👩‍👧", "aaaaaaaaaaaaaaaaaaaa"]
)


def cut(text: str, tokens: int, *, left: bool, context: int = 4096) -> list[int]:
    request = TextRequest(
        request_id="r", sampling=SamplingParams(), text=text, truncate=tokens, truncate_left=left,
        add_special_tokens=False,
    )  # fmt: skip
    return Encoder(TOKENIZER, None).encode_now(request, context)


@settings(max_examples=30)
@given(words=st.lists(WORDS, min_size=1, max_size=30), most=st.integers(1, 40), left=st.booleans())
def test_only_as_much_is_read_as_is_kept(words: list[str], most: int, left: bool) -> None:
    text = " ".join(words) * 60
    whole = TOKENIZER.encode(text, False)
    assert cut(text, most, left=left) == (whole[-most:] if left else whole[:most])


@pytest.mark.parametrize(("left", "found"), [(False, [1, 5]), (True, [6, 2])])
def test_text_that_is_written_otherwise_between_its_marks_is_cut_with_them(left: bool, found: list[int]) -> None:
    assert cut_tokens([1, 3, 4, 2], [3, 4], 3, left=left) == ([1, 4, 2] if left else [1, 3, 2])
    assert cut_tokens([1, 5, 6, 2], [3, 4], 2, left=left) == found


def test_more_than_the_context_is_refused_without_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = HubTokenizer.encode
    monkeypatch.setattr(
        HubTokenizer, "encode", lambda self, text, *rest: read.append(len(text)) or encode(self, text, *rest)
    )
    tokens = cut("the sea " * 1_000_000, 10**6, left=True, context=64)
    assert max(read) < 10_000
    with pytest.raises(ContextLengthError):
        check_context(len(tokens), 1, 64)
