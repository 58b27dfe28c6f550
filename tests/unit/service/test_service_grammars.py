"""Grammars by strangers, most of them hostile: each is refused in time, and none hurts the next."""

from __future__ import annotations

import asyncio
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
import pytest

from ropeway.contract import SamplingParams
from ropeway.errors import OverloadedError, RequestError
from ropeway.service.grammars import GrammarLimits, Grammars
from ropeway.text.grammar import from_json_schema, from_lark, from_structured_outputs
from ropeway.text.tokenizer import ByteTokenizer
from waiting import until

SECONDS = 10.0  # much more than the limits allow, for busy machines, and much less than it takes without them
"""Within which every one is told."""


def by_schema(schema: Any) -> SamplingParams:
    return SamplingParams(grammar=from_json_schema(schema, param="response_format"))


def by_regex(pattern: str) -> SamplingParams:
    return SamplingParams(grammar=from_structured_outputs({"regex": pattern}))


def by_lark(text: str) -> SamplingParams:
    return SamplingParams(grammar=from_lark(text))


def tower(level: Callable[[int], dict[str, Any]], height: int = 40) -> dict[str, Any]:
    """Definitions of which each refers to the one below several times."""
    parts = {f"d{i}": level(i) for i in range(1, height)}
    return {
        "$defs": {"d0": {"type": "object", "properties": {"x": {"type": "string"}}}, **parts},
        "$ref": f"#/$defs/d{height - 1}",
    }


def below(i: int) -> dict[str, str]:
    return {"$ref": f"#/$defs/d{i - 1}"}


HOSTILE: dict[str, Callable[[], SamplingParams]] = {
    "repeats of repeats": lambda: by_regex("(a{1,1000}){1,1000}"),
    "repeats to the fourth": lambda: by_regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "two to the 5000 states": lambda: by_regex(".*a.{5000}"),
    "many such": lambda: by_regex("(.*a.{20}b){20}"),
    "letters of all scripts": lambda: by_regex(r"(\p{L}{1,200}[^a]{1,200}){1,50}"),
    "30,000 alternatives": lambda: by_regex("|".join(f"a{i}" for i in range(30_000))),
    "20,000 brackets": lambda: by_regex("(" * 20_000 + "a" + ")" * 20_000),
    "250,000 letters": lambda: by_regex("a" * 250_000),
    "a tower of objects": lambda: by_schema(
        tower(lambda i: {"type": "object", "properties": {"a": below(i), "b": below(i)}, "required": ["a", "b"]})
    ),
    "a tower of allOf": lambda: by_schema(
        tower(lambda i: {"allOf": [below(i), below(i), {"type": "object", "properties": {f"y{i}": {}}}]})
    ),
    "a tower of anyOf": lambda: by_schema(tower(lambda i: {"anyOf": [below(i), {"type": "array", "items": below(i)}]})),
    "a product of anyOf": lambda: by_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(6)]} for i in range(8)]}
    ),
    "8,000 values": lambda: by_schema({"enum": [f"value {i}" for i in range(8_000)]}),
    "4,000 properties": lambda: by_schema({"type": "object", "properties": {f"p{i}": {} for i in range(4_000)}}),
    "ten million items": lambda: by_schema(
        {"type": "array", "items": {"type": "string", "pattern": "^(a|b)*c{1,1000}$"}, "minItems": 10**7}
    ),
    "a length and a pattern": lambda: by_schema({"type": "string", "pattern": "^(a|b)*$", "minLength": 10**5}),
    "multiples of a prime": lambda: by_schema({"type": "integer", "multipleOf": 10**9 + 7}),
    "an integer of 400 digits": lambda: by_schema({"type": "integer", "minimum": -(10**400)}),
    "10,000 brackets": lambda: by_lark("start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "two to the 60 letters": lambda: by_lark(
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "b"'
    ),
    "ambiguity": lambda: by_lark('start: s\ns: s s s | s s | "a" |'),
    "negations": lambda: by_lark("start: A\nA: ~/(.*a.{30})/ & ~/(.*b.{40})/ & /(?s:.*)/"),
}  # fmt: skip
WRONG: dict[str, tuple[Callable[[], SamplingParams], str, str]] = {
    "a schema that is nothing but itself": (lambda: by_schema({"$ref": "#"}), "no text", "response_format"),
    "a schema that is never met": (
        lambda: by_schema({"minimum": 5, "maximum": 3, "type": "integer"}), "minimum", "response_format",
    ),
    "a definition that is missing": (lambda: by_schema({"$ref": "#/$defs/no"}), "does not exist", "response_format"),
    "a keyword that cannot be enforced": (lambda: by_schema({"not": {}}), "not", "response_format"),
    "an open bracket": (lambda: by_regex("a("), "unclosed group", "structured_outputs"),
    "a look-ahead": (lambda: by_regex("(?=a)b"), "look-around", "structured_outputs"),
    "a rule that is missing": (lambda: by_lark("start: a"), "a", "tools"),
    "a rule that never ends": (lambda: by_lark("start: start"), "no text", "tools"),
    "a token that does not exist": (lambda: by_lark("start: <|no|>"), "special token", "tools"),
    "half a character": (lambda: by_lark('start: "\ud800"'), "surrogate", "tools"),
}  # fmt: skip


@pytest.fixture(scope="module")
def judges() -> Iterator[Grammars]:
    grammars = Grammars(ByteTokenizer(), (ByteTokenizer.EOS,))
    grammars.check_now(by_regex("started"))
    yield grammars
    grammars.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_judged_in_time(judges: Grammars, name: str) -> None:
    sampling = HOSTILE[name]()
    begun = time.monotonic()
    with suppress(RequestError):  # or it is harmless, since the library works out states as they are needed
        judges.check_now(sampling)
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize("name", WRONG)
def test_wrong_grammars_are_refused_with_the_reason(judges: Grammars, name: str) -> None:
    make, words, param = WRONG[name]
    with pytest.raises(RequestError, match=words) as caught:
        judges.check_now(make())
    assert caught.value.param == param
    assert "llguidance" not in caught.value.message
    assert len(caught.value.message) < 700


def test_a_minimum_gives_way_to_the_grammar(judges: Grammars) -> None:
    sampling = SamplingParams(min_tokens=9, grammar=from_lark('start: "a"'))
    assert judges.check_now(sampling).min_tokens == 0
    free = SamplingParams(min_tokens=9)
    assert judges.check_now(free) is free


@pytest.mark.parametrize(("limits", "words"), [
    (GrammarLimits(seconds=0.02), "longer than 0.02 s"),
    (GrammarLimits(seconds=5.0, deadline=0.05), "longer"),
    (GrammarLimits(max_memory=2**23), "more than 8 MiB"),
])  # fmt: skip
def test_limits_hold_and_the_next_one_finds_a_worker(limits: GrammarLimits, words: str) -> None:
    grammars = Grammars(ByteTokenizer(), (ByteTokenizer.EOS,), limits=limits, workers=1)
    heavy = by_schema({"type": "object", "properties": {f"p{i}": {} for i in range(3_000)}})

    def served() -> bool:
        try:
            grammars.check_now(by_lark('start: "a"'))
        except RequestError:  # late by the clock, on a busy machine
            return False
        return True

    others = {child.pid for child in psutil.Process().children()}
    try:
        with pytest.raises(RequestError, match=words):
            grammars.check_now(heavy)
        (worker,) = {child.pid for child in psutil.Process().children()} - others
        if limits.max_memory > 2**23:
            until(served)
        assert worker in [child.pid for child in psutil.Process().children()]
    finally:
        grammars.close()
    assert worker not in [child.pid for child in psutil.Process().children()]


def test_a_worker_that_is_killed_is_replaced_and_the_grammar_tried_again() -> None:
    """Somebody else may have killed it: that says nothing of the grammar."""
    grammars = Grammars(ByteTokenizer(), (ByteTokenizer.EOS,), workers=1)
    try:
        grammars.check_now(by_regex("started"))
        process = grammars._sandboxes[0]._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        sampling = by_lark('start: "a"')
        with ThreadPoolExecutor(1) as pool, open(f"/proc/{process.pid}/fd/0", "rb") as work:
            judged = pool.submit(grammars.check_now, sampling)
            assert select.select([work], [], [], 10) == ([work], [], [])
            process.kill()
            with pytest.raises(RequestError, match="ended the process"):
                judged.result()
        assert grammars.check_now(sampling) == sampling
    finally:
        grammars.close()


async def test_others_go_on_meanwhile(judges: Grammars) -> None:
    """The heavy ones take more than a second of processor time: whoever judged them on the loop would be seen there."""
    turns, begun = 0, time.thread_time()

    async def watch() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    watcher = asyncio.create_task(watch())
    same = [by_regex(f"same{n % 3}") for n in range(30)]
    heavy = [by_schema({"type": "object", "properties": {f"p{n}_{i}": {} for i in range(1_500)}}) for n in range(2)]
    answers = await asyncio.gather(*map(judges.check, same + heavy), return_exceptions=True)
    watcher.cancel()
    assert answers[:30] == same
    assert turns > 20
    assert time.thread_time() - begun < 0.5


async def test_too_many_are_told_to_come_back() -> None:
    grammars = Grammars(ByteTokenizer(), (ByteTokenizer.EOS,), limits=GrammarLimits(patience=0.0), workers=1)
    try:
        with pytest.raises(OverloadedError) as caught:
            await grammars.check(by_lark('start: "a"'))
        assert caught.value.retry_after
    finally:
        grammars.close()


def test_a_model_without_an_end_cannot_follow_grammars() -> None:
    with pytest.raises(RequestError, match="end token"):
        Grammars(ByteTokenizer(), ()).check_now(by_lark('start: "a"'))
