"""What structured output costs a batch: tokens a second with and without a schema, alternating in one run.

    python benchmarks/structured.py [--model bundled] [--rows 32] [--tokens 192] [--rounds 7]

Every answer has the same number of tokens: the schema is of a list that is never long enough, and free rows ignore end
tokens. "shared" gives all rows one schema, "own" each row another one that nobody has sent before, so that trying and
compiling it is part of the time, "half" gives one to every second row. A round runs all kinds one after the other,
beginning with another one each time; the table shows medians over the rounds, and the median of each round's ratio to
its own free batch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from ropeway import LLM, SamplingParams
from ropeway.text.grammar import from_json_schema

KINDS = ("free", "shared", "half", "own")


def schema(number: int = 0) -> dict[str, Any]:
    """A list of records of usual kinds of fields."""
    record = {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 10_000 + number},
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["cabin", "tower", "station", f"other {number}"]},
            "at": {"type": "string", "format": "date-time"},
            "load": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
            "owner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
        },
        "required": ["id", "name", "kind", "at", "load", "tags", "owner"],
        "additionalProperties": False,
    }
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "mail": {"type": "string", "format": "email"}},
        "required": ["name", "mail"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": 100, "$defs": {"person": person}}


def batch(kind: str, rows: int, tokens: int, fresh: Iterator[int]) -> list[SamplingParams]:
    shared = from_json_schema(schema(), param="benchmark")
    grammars: dict[str, Callable[[int], str]] = {
        "free": lambda row: "",
        "shared": lambda row: shared,
        "half": lambda row: shared if row % 2 else "",
        "own": lambda row: from_json_schema(schema(next(fresh)), param="benchmark"),
    }
    grammar = grammars[kind]
    return [
        SamplingParams(temperature=0.8, seed=row, max_tokens=tokens, ignore_eos=True, grammar=grammar(row))
        for row in range(rows)
    ]


def measure(llm: LLM, wishes: list[SamplingParams]) -> float:
    """Tokens a second."""
    prompts = [f"List number {row}, as JSON:\n" for row in range(len(wishes))]
    begun = time.perf_counter()
    answers = llm.generate(prompts, wishes, use_tqdm=False)
    seconds = time.perf_counter() - begun
    errors = [answer.error for answer in answers if answer.error is not None]
    assert not errors, errors[0]
    assert all(answer.outputs[0].finish_reason == "length" for answer in answers)
    return sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    fresh = itertools.count(1)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with LLM(arguments.model, max_num_seqs=arguments.rows) as llm:
        for kind in KINDS:
            measure(llm, batch(kind, arguments.rows, 16, fresh))
        for number in range(arguments.rounds):
            for kind in (*KINDS[number % len(KINDS) :], *KINDS[: number % len(KINDS)]):
                found[kind].append(measure(llm, batch(kind, arguments.rows, arguments.tokens, fresh)))
        print(f"{arguments.model}, {arguments.rows} rows of {arguments.tokens} tokens, {arguments.rounds} rounds")
    print("| rows with a schema | tokens/s | of free | lowest | highest |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        ratios = [with_ / free for with_, free in zip(found[kind], found["free"], strict=True)]
        print(
            f"| {kind} | {statistics.median(found[kind]):,.0f} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} | {max(ratios):.3f} |"
        )


if __name__ == "__main__":
    main()
