"""The training text of the bundled model: repeatable, true, and with its held-out part kept out."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from bundled_corpus import corpus, stories, tasks

ROOT = Path(__file__).resolve().parents[2]


def test_the_same_seed_gives_the_same_documents() -> None:
    first, again, other = (list(corpus.documents(seed, 400, ROOT)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def _values(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+) ([-+*]) (\d+) (?:=|is) (\d+)", text)]


def test_every_written_sum_is_true() -> None:
    rng = random.Random(5)
    texts = [tasks.equations(rng, lambda key: True) for _ in range(50)]
    texts += [tasks.arithmetic(rng).answer for _ in range(1000)]
    written = [v for text in texts for v in _values(text)]
    assert len(written) > 800
    for a, op, b, c in written:
        assert {"+": a + b, "-": a - b, "*": a * b}[op] == c


def test_sums_answer_their_own_question() -> None:
    asked = {"*": r"\*|times|Multiply", "-": r"-|minus|Subtract", "+": r"\+|plus|Add"}
    rng = random.Random(6)
    for _ in range(1000):
        made = tasks.arithmetic(rng)
        a, b = (int(n) for n in re.findall(r"\d+", made.question))
        if made.question.startswith("Subtract"):
            a, b = b, a
        op = next(op for op, words in asked.items() if re.search(words, made.question))
        assert int(re.findall(r"\d+", made.answer)[-1]) == {"+": a + b, "-": a - b, "*": a * b}[op], made


@pytest.mark.parametrize("kind", [corpus.concept, corpus.story, *corpus.TASKS], ids=lambda kind: kind.__name__)
def test_every_answer_passes_its_own_check_and_an_empty_one_does_not(kind) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(7)
    for _ in range(200):
        made = kind(rng)
        assert corpus.right(made, made.answer), made
        assert not corpus.right(made, "")


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("Apple, pear and plum.", True),
        ("- apple\n- pear\n- plum", True),
        ("1. apple\n2. pear\n3. plum", True),
        ("Apple and pear.", False),
        ("Apple, pear and pear.", False),
        ("Apple, pear and hammer.", False),
    ],
)
def test_lists_are_checked_strictly(answer: str, good: bool) -> None:
    assert tasks.check_list(answer, "fruits", 3) is good


def test_held_out_questions_never_occur_in_training() -> None:
    held = {it.key for it in corpus.evaluation_items(11, 12)}
    assert len(held) > 80
    trained: set[str] = set()
    rng = random.Random(12)
    trained.update(corpus.item(rng).key for _ in range(6000))
    assert trained & held == set()

    questions = {
        it.question.lower() for it in corpus.evaluation_items(11, 12) if it.kind in ("concept", "list", "fact")
    }
    assert questions
    seen = {m["content"].lower() for d in corpus.documents(13, 3000, ROOT) for m in d.messages if m["role"] == "user"}
    assert questions & seen == set()


def test_held_out_sums_do_not_occur_in_training_text_either() -> None:
    written = [v for d in corpus.documents(14, 3000, ROOT) for v in _values(d.text)]
    assert len(written) > 300
    assert not any(corpus.held_out(tasks.sum_key(op, a, b)) for a, op, b, _ in written)


def test_a_tenth_of_the_sums_is_held_out_in_both_orders() -> None:
    pairs = [(a, b) for a in range(11, 100) for b in range(a, 100)]
    held = [p for p in pairs if corpus.held_out(tasks.sum_key("+", *p))]
    assert 0.07 < len(held) / len(pairs) < 0.13
    assert all(tasks.sum_key("+", b, a) == tasks.sum_key("+", a, b) for a, b in held)


def test_conversations_alternate_and_end_with_an_answer() -> None:
    lengths = set()
    for document in corpus.documents(15, 600, ROOT):
        roles = [m["role"] for m in document.messages]
        if not roles:
            assert document.text
            continue
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        lengths.update(len(m["content"].split()) for m in document.messages if m["role"] == "assistant")
    assert min(lengths) == 1
    assert max(lengths) > 150


def test_stories_keep_to_the_request_and_differ_in_length() -> None:
    rng = random.Random(16)
    words: dict[str, list[int]] = {length: [] for length in stories.LENGTHS}
    for _ in range(300):
        told = stories.make(rng)
        assert "{" not in told.text
        assert told.hero in told.text
        assert told.thing in told.text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", told.text), told.text
        words[told.length].append(len(told.text.split()))
    averages = [sum(words[length]) / len(words[length]) for length in stories.LENGTHS]
    assert averages == sorted(averages)
    assert averages[-1] > 3 * averages[0]


def test_documentation_is_part_of_the_training_text() -> None:
    pieces = corpus.project_text(ROOT)
    assert any("static batching" in piece.lower() for piece in pieces)
    assert not any("```" in piece for piece in pieces)
