"""Small tasks with answers that can be checked: sums, lists, counting, sorting, copying, simple facts, poems."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """A question with one true answer.

    `kind` groups items in the evaluation. `key` is the content that decides between training and held-out (see
    `corpus.held_out`); an empty key is always training. `checks` are regular expressions, all of which a right answer
    matches (case does not matter).
    """

    kind: str
    question: str
    answer: str
    key: str
    checks: tuple[str, ...]


@cache
def facts() -> dict[str, Any]:
    """The word lists of the tasks."""
    return tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))


def join(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "+": ("plus", lambda a, b: a + b),
    "-": ("minus", lambda a, b: a - b),
    "*": ("times", lambda a, b: a * b),
}


def operands(rng: random.Random, op: str) -> tuple[int, int]:
    """Two numbers: up to 99 for sums (small ones more often), no negative differences, products up to 10 by 10."""
    top = 10 if op == "*" else rng.choice((10, 20, 99, 99))
    a, b = rng.randint(0, top), rng.randint(0, top)
    return (max(a, b), min(a, b)) if op == "-" else (a, b)


def sum_key(op: str, a: int, b: int) -> str:
    """Both orders of a sum share a key. Sums of two small numbers and the times tables are facts, always trained."""
    return "" if op == "*" or max(a, b) <= 10 else f"sum {op} {min(a, b)} {max(a, b)}"


def arithmetic(rng: random.Random) -> Item:
    op = rng.choices("+-*", (4, 3, 2))[0]
    a, b = operands(rng, op)
    word, apply = OPERATIONS[op]
    c = apply(a, b)
    verb = {"+": f"Add {a} and {b}.", "-": f"Subtract {b} from {a}.", "*": f"Multiply {a} by {b}."}[op]
    question = rng.choice(
        [
            *[f"What is {a} {op} {b}?"] * 4,
            f"What is {a} {word} {b}?",
            f"{a} {op} {b} =",
            f"{a} {op} {b}",
            f"How much is {a} {op} {b}?",
            f"Calculate {a} {op} {b}.",
            verb,
            f"{a} {op} {b} = ?",
            f"Compute {a} {op} {b}.",
            f"How much is {a} {word} {b}?",
            f"And {a} {op} {b}?",
            f"{a}{op}{b}",
        ]
    )
    answer = rng.choice(
        [f"{c}"] * 3 + [f"{a} {op} {b} = {c}"] * 3 + [f"{a} {op} {b} is {c}.", f"The answer is {c}.", f"It is {c}."]
    )
    return Item(
        "arithmetic" if op != "*" else "times table", question, answer, sum_key(op, a, b), (rf"(?<!\d){c}\.?$",)
    )


def equations(rng: random.Random, keep: Callable[[str], bool]) -> str:
    """Plain text: lines of sums. `keep` says which keys may appear."""
    lines: list[str] = []
    while len(lines) < 12:
        op = rng.choices("+-*", (4, 3, 1))[0]
        a, b = operands(rng, op)
        if keep(sum_key(op, a, b)):
            lines.append(f"{a} {op} {b} = {OPERATIONS[op][1](a, b)}")
    return "\n".join(lines)


def lists(rng: random.Random) -> Item:
    f = facts()
    name = rng.choice(sorted(f["lists"]))
    count = rng.randint(1, min(7, len(f["lists"][name])))
    words = rng.sample(f["lists"][name], count)
    n = rng.choice([NUMBERS[count], NUMBERS[count], str(count)])
    noun = name if count > 1 else f["singular"][name]
    if name == "clothes" and count > 1:
        noun = "pieces of clothing"
    question, style = rng.choice(
        [
            (f"Name {n} {noun}.", "line"),
            (f"Tell me {n} {noun}.", "line"),
            (f"Give me {n} {noun}.", "line"),
            (f"List {n} {noun}.", "bullets"),
            (f"Make a list of {n} {noun}.", "bullets"),
            (f"Write a numbered list of {n} {noun}.", "numbers"),
            (f"Can you name {n} {noun}?", "line"),
            (f"List {n} {noun}, numbered.", "numbers"),
            (f"Write down {n} {noun}.", "bullets"),
            (f"I need {n} {noun}.", "line"),
        ]
    )
    if style == "line":
        answer = join(words)
        answer = answer[0].upper() + answer[1:] + "."
    elif style == "bullets":
        answer = "\n".join(f"- {w}" for w in words)
    else:
        answer = "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1))
    return Item("list", question, answer, f"list {question}", (f"list:{name}:{count}",))


def counting(rng: random.Random) -> Item:
    first = rng.randint(0, 30) if rng.random() < 0.5 else 1
    last = first + (rng.randint(15, 59) if rng.random() < 0.08 else rng.randint(2, 14))
    up = rng.random() < 0.7
    numbers = ", ".join(str(i) for i in (range(first, last + 1) if up else range(last, first - 1, -1)))
    if up:
        question = rng.choice(
            [f"Count from {first} to {last}."] * 3
            + [f"Count from {first} up to {last}.", f"List the numbers from {first} to {last}."]
        )
        if first == 1:
            question = rng.choice([question, f"Count to {last}.", f"Count to {NUMBERS[last] if last <= 10 else last}."])
    else:
        question = rng.choice([f"Count backwards from {last} to {first}.", f"Count down from {last} to {first}."])
    return Item("counting", question, numbers, f"count {first} {last} {up}", (rf"(?<!\d){numbers}\.?$",))


def order(rng: random.Random) -> Item:
    """Days, months, letters: what comes next, and whole cycles."""
    f = facts()["cycles"]
    unit = rng.choice(["day", "month", "letter", "all"])
    if unit == "all":
        unit = rng.choice(sorted(f))
        question = rng.choice(
            [
                f"What are the {unit}s{' of the week' if unit == 'day' else ''}?",
                f"Name the {unit}s{' of the year' if unit == 'month' else ''}.",
                f"List all {unit}s.",
            ]
        )
        return Item("order", question, join(f[unit]) + ".", "", (join(f[unit]),))
    cycle = [chr(65 + i) for i in range(26)] if unit == "letter" else f[unit]
    i = rng.randrange(len(cycle) - 1) if unit == "letter" else rng.randrange(len(cycle))
    here, after = cycle[i], cycle[(i + 1) % len(cycle)]
    which = rng.choice([f"What {unit} comes", f"Which {unit} comes", f"Which {unit} is"])
    if rng.random() < 0.6:
        question, answer, why = f"{which} after {here}?", after, f"After {here} comes {after}."
    else:
        question, answer, why = f"{which} before {after}?", here, f"Before {after} comes {here}."
    return Item("order", question, rng.choice([f"{answer}.", why]), "", (rf"\b{answer}\.$",))


def compare(rng: random.Random) -> Item:
    a, b = rng.sample(range(0, 100), 2)
    big, small = max(a, b), min(a, b)
    key = f"compare {small} {big}"
    form = rng.randrange(3)
    if form == 0:
        return Item(
            "compare",
            f"Which number is {rng.choice(['larger', 'bigger', 'greater'])}, {a} or {b}?",
            rng.choice([f"{big}", f"{big} is larger than {small}."]),
            key,
            (rf"^{big}\b",),
        )
    if form == 1:
        return Item(
            "compare",
            f"Which number is smaller, {a} or {b}?",
            rng.choice([f"{small}", f"{small} is smaller than {big}."]),
            key,
            (rf"^{small}\b",),
        )
    true = a > b
    answer = f"{'Yes' if true else 'No'}, {big} is larger than {small}."
    return Item("compare", f"Is {a} larger than {b}?", answer, key, (rf"^{'Yes' if true else 'No'}\b",))


def sorting(rng: random.Random) -> Item:
    count = rng.randint(3, 5)
    if rng.random() < 0.5:
        numbers = rng.sample(range(0, 30), count)
        shown, answer = ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))
        question = rng.choice(
            [f"Sort these numbers: {shown}.", f"Sort {shown}.", f"Put these numbers in order: {shown}."]
        )
    else:
        words = rng.sample(rng.choice([v for _, v in sorted(facts()["lists"].items())]), count)
        shown, answer = ", ".join(words), ", ".join(reversed(words))
        question = rng.choice([f"Reverse this list: {shown}.", f"Write this list backwards: {shown}."])
    return Item("sort and reverse", question, answer, f"sort {shown}", (rf"^{answer}\.?$",))


def copying(rng: random.Random) -> Item:
    """Say something again. Rows of unrelated words teach a model to look back, which sums and stories need as well."""
    f = facts()
    pool = [w for _, ws in sorted(f["lists"].items()) for w in ws] + [str(n) for n in range(100)]
    words = " ".join(rng.choice(pool) for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 10, 12))))
    if rng.random() < 0.2:
        words = rng.choice(f["text"]["copy"])
    if rng.random() < 0.1 and len(words) < 40:
        question, answer = f'How many words are in "{words}"?', str(len(words.split()))
        return Item("copy", question, answer, f"copy {words}", (rf"^{answer}\b",))
    question = rng.choice([f"Repeat after me: {words}", f"Repeat: {words}", f"Say: {words}", f'Say "{words}".'])
    return Item("copy", question, words, f"copy {words}", (rf"^{words}$",))


def fact(rng: random.Random) -> Item:
    f = facts()["facts"]
    topic = f[rng.choices(sorted(f), [1 + len(f[k]["pairs"]) for k in sorted(f)])[0]]
    x = rng.choice(sorted(topic["pairs"]))
    y = topic["pairs"][x]
    answer = rng.choice(topic["say"]).format(x=x, y=y)
    question = rng.choice(topic["ask"]).format(x=x)
    key = f"fact {question}" if len(topic["ask"]) > 1 else ""  # a fact with one phrasing must be seen in training
    return Item("fact", question, answer[0].upper() + answer[1:], key, (rf"\b{y}\b",))


def poem(rng: random.Random) -> Item:
    subject, lines = rng.choice(sorted(facts()["poems"].items()))
    the = subject if subject in ("winter", "spring") else f"a {subject}" if subject == "cat" else f"the {subject}"
    short = rng.random() < 0.4
    question = rng.choice(
        [
            f"Write a {'short ' if short else ''}poem about {the}.",
            f"A {'short ' if short else ''}poem about {the}, please.",
            f"Tell me a {'short ' if short else ''}poem about {the}.",
        ]
    )
    if rng.random() < 0.2:
        question, short = rng.choice(["Write a poem.", "Tell me a poem.", "Write some verses.", "Sing a song."]), False
    return Item(
        "poem",
        question,
        "\n".join(sorted(rng.sample(lines, 2), key=lines.index) if short else lines),
        "",
        (r"\w[,.;]\n\w",),
    )


def unknown(rng: random.Random) -> Item:
    """Questions that so small a model cannot answer; it should say so instead of inventing something."""
    u = facts()["unknown"]
    fill = {k: rng.choice(u[k]) for k in ("place", "language", "thing")}
    question = rng.choice(u["ask"]).format(**fill, n=rng.randint(11, 999), year=rng.randint(1300, 2020))
    return Item("unknown", question, rng.choice(u["say"]), f"unknown {question}", (r"do not know|too hard|beyond me",))


def check_list(answer: str, name: str, count: int) -> bool:
    """Whether `answer` lists exactly `count` different members of the category `name`."""
    text = answer.strip().rstrip(".").lower()
    if "\n" in text or text[:1] in "-1":
        parts = [line.lstrip("-0123456789. ") for line in text.split("\n")]
    else:
        parts = text.replace(" and ", ", ").split(", ")
    known = {w.lower() for w in facts()["lists"][name]}
    return len(parts) == count and len(set(parts)) == count and all(p in known for p in parts)
