"""Conversations and plain text for the bundled model, and the rule that keeps held-out material out of training."""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import stories, tasks
from .tasks import Item, check_list, facts

Message = dict[str, str]
_CONCEPTS = Path(__file__).with_name("concepts.toml")

TASKS: dict[Callable[[random.Random], Item], int] = {
    tasks.arithmetic: 34, tasks.lists: 12, tasks.counting: 5, tasks.order: 5, tasks.compare: 4, tasks.sorting: 6,
    tasks.copying: 14, tasks.fact: 6, tasks.poem: 3, tasks.unknown: 5,
}  # fmt: skip

BRIEF = [
    "In one sentence, what is {x}?",
    "Define {x}.",
    "Give me a short definition of {x}.",
    "Briefly, what is {x}?",
    "Explain {x} in one sentence.",
]
NORMAL = [
    "What is {x}?",
    "Explain {x}.",
    "Can you explain {x}?",
    "Tell me about {x}.",
    "What do you know about {x}?",
    "Please explain {x}.",
    "{X}?",
    "I do not understand {x}.",
    "What is meant by {x}?",
    "Could you tell me what {x} is?",
    "What does the term {x} mean?",
]
LONG = [
    "Explain {x} in detail.",
    "Tell me everything about {x}.",
    "Explain {x} in a few sentences.",
    "Give me a long explanation of {x}.",
    "Describe {x} in detail.",
]


@dataclass(frozen=True)
class Document:
    """A training text: a conversation (`messages`) or plain text (`text`)."""

    kind: str
    messages: tuple[Message, ...] = ()
    text: str = ""


@cache
def topics() -> list[dict[str, Any]]:
    """The topics about serving, from `concepts.toml`."""
    loaded: list[dict[str, Any]] = tomllib.loads(_CONCEPTS.read_text(encoding="utf-8"))["topic"]
    return loaded


def held_out(key: str) -> bool:
    """Whether the content `key` is held out: one key in ten, by hash, whatever the seed. An empty key never is."""
    return bool(key) and hashlib.sha256(key.lower().encode()).digest()[0] % 10 == 0


def _plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith("ss")


def _ask(template: str, name: str) -> str:
    question = template.format(x=name, X=name[0].upper() + name[1:])
    if _plural(name):
        question = question.replace("what is ", "what are ").replace("What is ", "What are ")
        question = question.replace(f"what {name} is", f"what {name} are")
    return question


def _bare(question: str) -> str:
    return question.lower().rstrip(" ?.!")


@cache
def plain_questions() -> frozenset[str]:
    """Questions that are always trained as they stand, so that a mere change of case is no held-out question."""
    bare = {_bare(q) for t in topics() for q in [*t.get("ask", []), *(_ask(NORMAL[0], n) for n in t.get("names", []))]}
    single = (f for f in facts()["facts"].values() if len(f["ask"]) == 1)
    return frozenset(bare | {_bare(f["ask"][0].format(x=x)) for f in single for x in f["pairs"]})


def concept(rng: random.Random) -> Item:
    """A question about serving, plain or decorated. Plain `ask` entries and "What is ...?" are always training."""
    topic = rng.choice(topics())
    names, ask, length, key = topic.get("names", []), topic.get("ask", []), "normal", ""
    if names and (not ask or rng.random() < 0.6):
        name = rng.choice(names)
        length = rng.choices(("brief", "normal", "long"), (2, 6, 2))[0]
        template = rng.choice({"brief": BRIEF, "normal": NORMAL, "long": LONG}[length])
        question = _ask(template, name)
        if template != NORMAL[0]:
            key = question
    else:
        question = rng.choice(ask)
        if topic["more"] and rng.random() < 0.25:
            length, tail = rng.choice(
                [("brief", " Answer briefly."), ("brief", " In one sentence, please."), ("long", " Explain in detail.")]
            )
            key = question = question.rstrip() + tail
    more = topic["more"]
    count = {"brief": 0, "normal": rng.choices((0, 1, 2), (25, 45, 30))[0], "long": len(more)}[length]
    chosen = sorted(rng.sample(range(len(more)), min(count, len(more))))
    answer = " ".join([rng.choice(topic["short"]), *(more[i] for i in chosen)])
    return Item("concept", question, answer, f"concept {key}" if key else "", tuple(topic["keys"]))


def story(rng: random.Random) -> Item:
    s = stories.make(rng)
    key = f"story {s.request}" if s.hero else ""
    return Item("story", s.request, s.text, key, tuple(rf"\b{w}" for w in (s.hero, s.thing) if w))


def _decorate(rng: random.Random, item: Item) -> Item:
    """The same question as people type it: with a greeting, in small letters, without the mark at the end."""
    question, key = item.question, item.key
    text = facts()["text"]
    if rng.random() < 0.12 and item.kind != "copy":
        question = rng.choice(text["prefixes"]) + question
    if rng.random() < 0.06 and question.endswith(("?", ".")) and item.kind != "copy":
        question += rng.choice(text["suffixes"])
    if rng.random() < 0.12 and item.kind != "copy":
        question = question.lower()
    if rng.random() < 0.08 and len(question) > 2:
        question = question.rstrip("?.!")
    if question != item.question and item.kind in ("concept", "fact", "list"):
        key = key or f"{item.kind} {question}"
    return Item(item.kind, question, item.answer, key, item.checks)


def item(rng: random.Random, want_held_out: bool = False, kind: Callable[[random.Random], Item] | None = None) -> Item:
    """A random item from the training side, or from the held-out side."""
    while True:
        if kind is None:
            share = rng.random()
            make = (
                concept if share < 0.4 else story if share < 0.5 else rng.choices(list(TASKS), list(TASKS.values()))[0]
            )
        else:
            make = kind
        made = _decorate(rng, make(rng))
        if held_out(made.key) == want_held_out and not (want_held_out and _bare(made.question) in plain_questions()):
            return made


def _introduction(rng: random.Random) -> tuple[list[Message], list[Message]]:
    """The user gives a name at the start and asks for it later."""
    name = rng.choice(stories.words()["names"])
    hello = rng.choice([f"My name is {name}.", f"Hello, my name is {name}.", f"I am {name}.", f"Hi, I am {name}!"])
    ask = rng.choice(["What is my name?", "Do you know my name?", "Who am I?"])
    first = [
        {"role": "user", "content": hello},
        {
            "role": "assistant",
            "content": rng.choice([f"Nice to meet you, {name}!", f"Hello, {name}! How can I help you?"]),
        },
    ]
    last = [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": rng.choice([f"Your name is {name}.", f"You are {name}."])},
    ]
    return first, last


def conversation(rng: random.Random) -> Document:
    """One to five turns, sometimes with a system message."""
    turns = rng.choices((1, 2, 3, 4), (60, 20, 12, 8))[0]
    items = [item(rng) for _ in range(turns)]
    if items[0].kind in ("arithmetic", "times table", "compare", "counting"):  # short ones travel together
        items += [item(rng, kind=tasks.arithmetic) for _ in range(rng.randint(0, 3))]
    messages: list[Message] = []
    system = facts()["text"]["system"]
    brief = turns == 1 and items[0].kind == "concept" and rng.random() < 0.12
    if brief:
        topic = next(t for t in topics() if any(items[0].answer.startswith(s) for s in t["short"]))
        first = next(s for s in topic["short"] if items[0].answer.startswith(s))
        items[0] = Item(items[0].kind, items[0].question, first, items[0].key, items[0].checks)
        messages.append({"role": "system", "content": rng.choice(facts()["text"]["system_brief"])})
    elif rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(system)})
    before, after = _introduction(rng) if rng.random() < 0.04 else ([], [])
    messages += before
    for it in items:
        messages += [{"role": "user", "content": it.question}, {"role": "assistant", "content": it.answer}]
    return Document(items[0].kind, (*messages, *after))


@cache
def project_text(root: Path) -> tuple[str, ...]:
    """Pieces of the project's documentation (`README.md`, `docs/*.md`), cut at headings; code blocks are left out."""
    pieces = []
    for path in [*sorted((root / "docs").glob("*.md")), root / "README.md"]:
        if not path.is_file():
            continue
        text = re.sub(r"```.*?```\n?", "", path.read_text(encoding="utf-8"), flags=re.S)
        for part in re.split(r"\n(?=#+ )", text):
            paragraphs = [re.sub(r"\s*\n(?![-|#*])", " ", p).strip() for p in part.split("\n\n")]
            body = "\n\n".join(p for p in paragraphs if p and not p.startswith(("|", "<", "[!")))
            if len(body.split()) > 20:
                pieces.append(body[:2400])
    return tuple(pieces)


def plain(rng: random.Random, docs: tuple[str, ...]) -> Document:
    """Plain text without the chat format: documentation, stories, sums, sentences about a topic."""
    share = rng.random()
    if share < 0.2 and docs:
        return Document("documentation", text=rng.choice(docs))
    if share < 0.5:
        return Document("plain story", text=item(rng, kind=story).answer)
    if share < 0.85:
        return Document("equations", text=tasks.equations(rng, lambda key: not held_out(key)))
    chosen = rng.sample(topics()[:55], rng.randint(1, 3))
    return Document("plain concept", text="\n\n".join(" ".join([rng.choice(t["short"]), *t["more"]]) for t in chosen))


def documents(seed: int, count: int, root: Path) -> Iterator[Document]:
    """`count` training documents, the same for the same seed and documentation."""
    rng = random.Random(seed)
    docs = project_text(root)
    for _ in range(count):
        yield plain(rng, docs) if rng.random() < 0.12 else conversation(rng)


def evaluation_items(seed: int, per_kind: int) -> list[Item]:
    """Held-out questions, `per_kind` of each kind that has held-out content, without repetition."""
    rng = random.Random(seed)
    chosen: list[Item] = []
    for kind in (concept, story, *TASKS):
        if kind in (tasks.poem, tasks.order):  # nothing of these is held out
            continue
        seen: set[str] = set()
        tries = 0
        while len(seen) < per_kind and tries < per_kind * 60:
            tries += 1
            it = item(rng, True, kind)
            if it.question not in seen:
                seen.add(it.question)
                chosen.append(it)
    return chosen


def right(it: Item, answer: str) -> bool:
    """Whether `answer` is a right answer to `it`."""
    text = answer.strip()
    for check in it.checks:
        if check.startswith("list:"):
            _, name, count = check.split(":")
            if not check_list(text, name, int(count)):
                return False
        elif not re.search(check, text, re.I):
            return False
    return bool(text)
