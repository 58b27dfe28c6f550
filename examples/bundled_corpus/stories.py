"""Short stories from a grammar: a plot of four beats, told at one of four lengths, that keeps to what was asked for."""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LENGTHS = ("tiny", "short", "medium", "long")
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "his", "him"), "it": ("it", "its", "it")}
SHE_NAMES = frozenset(
    (
        "Mira",
        "Lena",
        "Nora",
        "Ada",
        "Ida",
        "Ella",
        "Rosa",
        "Anna",
        "Clara",
        "Greta",
        "Luna",
        "Maya",
        "Sofia",
        "Vera",
        "Zoe",
    )
)


@dataclass(frozen=True)
class Story:
    """A story and the request that it answers. `hero` and `thing`, where not empty, are words that it must contain."""

    request: str
    text: str
    hero: str
    thing: str
    length: str


@cache
def words() -> dict[str, Any]:
    """The word lists and sentences of the grammar."""
    return tomllib.loads(Path(__file__).with_name("stories.toml").read_text(encoding="utf-8"))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def tell(rng: random.Random, hero: str, thing: str, place: str, name: str, length: str) -> str:
    """A story about `hero` (a noun), `thing` (with its article) and `place` (with its preposition)."""
    w = words()
    they, their, them = PRONOUNS["it" if hero == "robot" else "she" if name in SHE_NAMES else "he"]
    noun = thing.split(" ", 1)[1]
    friend = rng.choice(w["helpers"])
    trait = rng.choice(w["traits"])
    fields = {
        "hero": hero,
        "name": name,
        "trait": trait,
        "place": place,
        "thing": thing,
        "the_thing": f"the {noun}",
        "friend": f"the {friend}",
        "Friend": f"The {friend}",
        "they": they,
        "They": they.capitalize(),
        "their": their,
        "them": them,
    }

    def pick(lines: list[str], count: int = 1) -> list[str]:
        return [line.format(**fields) for line in rng.sample(lines, count)]

    plot = w["want"][rng.choice(sorted(w["want"]))]
    opening = pick(w["opening"])[0].replace(f"a {trait}", _article(trait))
    start, trouble, help_, end = (pick(plot[beat]) for beat in ("start", "trouble", "help", "end"))
    close, moral = pick(w["endings"]["close"]), pick(w["endings"]["moral"])
    if length == "tiny":
        return " ".join([opening, *start, *end])
    if length == "short":
        return " ".join([opening, *start, *trouble, *help_, *end, *rng.choice((close, moral, []))])
    first = [opening, *pick(w["life"], 1 if length == "medium" else 2)]
    last = [*end, *close, *moral]
    if length == "medium":
        return "\n\n".join(" ".join(part) for part in (first, start + trouble, help_ + last))
    scenes = pick(w["scenes"]["road"], rng.randint(2, 3))
    return "\n\n".join([" ".join(first), " ".join(start), *scenes, " ".join(trouble + help_), " ".join(last)])


ASK = {
    "tiny": [
        "Tell me a very short story about {x}.",
        "Write a tiny story about {x}.",
        "A story about {x} in three sentences, please.",
        "Write three sentences about {x}.",
    ],
    "short": [
        "Tell me a short story about {x}.",
        "Write a short story about {x}.",
        "Please tell me a short story about {x}.",
        "A short story about {x}, please.",
    ],
    "medium": [
        "Tell me a story about {x}.",
        "Write a story about {x}.",
        "Can you tell me a story about {x}?",
        "Please write a story about {x}.",
        "I would like to hear a story about {x}.",
    ],
    "long": [
        "Tell me a long story about {x}.",
        "Write a long story about {x}.",
        "Please tell me a long story about {x}.",
        "Can you write a long story about {x}?",
        "Tell me a bedtime story about {x}.",
    ],
}
OPEN = {
    "tiny": ["Tell me a very short story."],
    "short": ["Tell me a short story.", "Write a short story.", "A short story, please."],
    "medium": ["Tell me a story.", "Write a story.", "Please tell me a story.", "Once upon a time"],
    "long": ["Tell me a long story.", "Write a long story.", "Tell me a bedtime story."],
}


def make(rng: random.Random, length: str | None = None) -> Story:
    """A random request for a story, and a story that keeps to it."""
    w = words()
    length = length or rng.choices(LENGTHS, (2, 3, 4, 2))[0]
    hero, thing, place, name = (rng.choice(w[k]) for k in ("heroes", "things", "places", "names"))
    while (hero in ("girl", "queen")) > (name in SHE_NAMES) or (hero in ("boy", "king")) > (name not in SHE_NAMES):
        name = rng.choice(w["names"])
    text = tell(rng, hero, thing, place, name, length)
    subject = rng.choice(
        [_article(hero)] * 4
        + [f"{_article(hero)} and {thing}"] * 3
        + [f"{_article(hero)} named {name}"] * 2
        + [f"{_article(hero)} {place}"] * 2
        + [f"{_article(hero)} who finds {thing}", ""]
    )
    if not subject:
        return Story(rng.choice(OPEN[length]), text, "", "", length)
    noun = thing.split(" ")[-1] if thing in subject else ""
    return Story(rng.choice(ASK[length]).format(x=subject), text, hero, noun, length)
