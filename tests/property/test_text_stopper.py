"""Stop strings against a specification that looks at the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.text.output import OutputText
from ropeway.text.stopper import StopAutomaton, Stopper
from ropeway.text.tokenizer import ByteTokenizer

SMALL = st.text("abé", max_size=24)
STOPS = st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4)
SOME_STOPS = st.one_of(st.just([]), STOPS)
CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(begin, end) of the occurrence that ends first, of those the one that begins first."""
    found = [(at + len(s), at) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    return min(found)[::-1] if found else None


def longest_hope(text: str, stops: list[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def pieces(text: str, cuts: list[int]) -> list[str]:
    found, at, turn = [], 0, 0
    while at < len(text):
        size = cuts[turn % len(cuts)]
        found.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return found


@settings(max_examples=400)
@given(text=SMALL, stops=STOPS, cuts=CUTS, include=st.booleans())
def test_the_split_of_the_text_makes_no_difference(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    stopper = Stopper(StopAutomaton.of(stops), include=include)
    seen, shown = "", ""
    for piece in pieces(text, cuts):
        seen += piece
        shown += stopper.push(piece)
        if stopper.matched is None:
            # Exactly the part that may still become a stop string is held.
            assert shown == seen[: len(seen) - longest_hope(seen, stops)]
    match = first_stop(text, stops)
    shown += stopper.flush()
    if match is None:
        assert (shown, stopper.matched) == (text, None)
    else:
        begin, end = match
        assert (shown, stopper.matched) == (text[: end if include else begin], text[begin:end])


@settings(max_examples=250)
@given(text=SMALL, stops=SOME_STOPS, cuts=CUTS, min_tokens=st.integers(0, 12))
def test_tokens_stay_with_their_text(text: str, stops: list[str], cuts: list[int], min_tokens: int) -> None:
    """Over bytes, so that characters span tokens: whatever has been delivered, its tokens spell its text."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, False)
    automaton = StopAutomaton.of(stops) if stops else None
    output = OutputText(tokenizer.decoder(), automaton, min_tokens=min_tokens)
    shown, tokens, stop, at, turn = "", list[int](), None, 0, 0
    while at < len(ids) and stop is None:
        size = cuts[turn % len(cuts)]
        piece = output.push(ids[at : at + size])
        shown, tokens, stop = shown + piece.text, tokens + piece.tokens, piece.stop
        at, turn = at + size, turn + 1
        if stop is None:
            assert tokenizer.decode(tokens) == shown
    if stop is None:
        piece = output.finish()
        shown, tokens, stop = shown + piece.text, tokens + piece.tokens, piece.stop
    # Matches that are complete within the first min_tokens bytes do not count.
    ends = [(len(text[:i].encode()), i) for i in range(len(text) + 1)]
    counted = [i for size, i in ends if size > min_tokens]
    matches = [(i, i - len(s), s) for i in counted for s in stops if text[:i].endswith(s)]
    if not matches:
        assert (shown, tokens, stop) == (text, ids, None)
        return
    end, begin, expected = min(matches)
    assert (shown, stop) == (text[:begin], expected)
    assert tokens == list(text[:end].encode())
    assert output.count == len(tokens)
