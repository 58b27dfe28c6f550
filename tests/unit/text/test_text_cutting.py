"""Cut prompts and pairs are those that `tokenizers` itself would cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_checkpoints import letters
from ropeway.errors import RequestError
from ropeway.service.encoder import cut
from ropeway.text.tokenizer import ByteTokenizer, HubTokenizer

OURS = HubTokenizer(letters())
TEXTS = st.text(alphabet="abc .", max_size=12)


@settings(max_examples=80)
@given(text=TEXTS, most=st.integers(2, 16), left=st.booleans())
def test_a_text(text: str, most: int, left: bool) -> None:
    theirs = letters()
    theirs.enable_truncation(most, direction="left" if left else "right")
    assert cut(OURS.encode(text), OURS.encode(text, False), most, left=left) == theirs.encode(text).ids


@settings(max_examples=80)
@given(first=TEXTS, second=TEXTS, room=st.integers(1, 16))
def test_a_pair(first: str, second: str, room: int) -> None:
    most = len(OURS.encode(first, False)) + 3 + room
    theirs = letters()
    theirs.enable_truncation(most, strategy="only_second")
    expected = theirs.encode(first, second)
    assert OURS.encode_pair(first, second, most) == (expected.ids, expected.type_ids.index(1))
    assert OURS.encode_pair(first, second) == OURS.encode_pair(first, second, 1000)


def test_each_side_has_a_limit_of_its_own() -> None:
    assert OURS.encode_pair("abc", "abcd", None, (1, 2)) == OURS.encode_pair("a", "ab")
    assert ByteTokenizer().encode_pair("abc", "abcd", None, (1, 2)) == ByteTokenizer().encode_pair("a", "ab")


@pytest.mark.parametrize("tokenizer", [OURS, ByteTokenizer()])
def test_a_first_text_that_leaves_no_room_is_refused(tokenizer: HubTokenizer | ByteTokenizer) -> None:
    with pytest.raises(RequestError, match="leaves no room") as refused:
        tokenizer.encode_pair("abc", "a", 5)
    assert refused.value.param == "query"
