"""Answers that follow a schema, an expression or a grammar, through the whole engine, with trained and random weights.

ROPEWAY_SCHEMAS=1000 tries that many generated schemas with each model instead of a sample.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import pytest

import schemas
from blind import Blind
from native import needs_native
from ropeway import LLM, SamplingParams
from ropeway.engine import engine
from ropeway.errors import RequestError
from ropeway.scheduler import Scheduler
from ropeway.service.offline import RequestOutput
from ropeway.text.grammar import from_json_schema, from_lark, from_structured_outputs

SCHEMAS = int(os.environ.get("ROPEWAY_SCHEMAS", "50"))
FORMATS = jsonschema.FormatChecker(["uuid", "ipv4", "email"])
LIST = from_structured_outputs({"json": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 9}})
WORDS = from_structured_outputs({"regex": "([a-z]{2,8} ){3,6}end"})
Make = Callable[[str], Path]


@contextmanager
def running(model: str | Path, *, starved: bool = False, **config: Any) -> Iterator[LLM]:
    blind = patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())) if starved else nullcontext()
    with blind, LLM(model, device="cpu", threads=1, **config) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running("bundled", max_num_seqs=32) as made:
        yield made


def texts(answers: list[RequestOutput]) -> list[str]:
    assert [answer.error for answer in answers if answer.error is not None] == []
    return [answer.outputs[0].text for answer in answers]


@pytest.mark.parametrize("words", ["bundled", "byte_level", "sentence_piece"])
def test_finished_answers_follow_their_schemas(llm: LLM, words: str, checkpoint: Make, tmp_path: Path) -> None:
    made = [schemas.schema(number) for number in range(SCHEMAS)]
    wishes = [
        SamplingParams(max_tokens=160, seed=number, grammar=from_json_schema(schema, param="response_format"))
        for number, schema in enumerate(made)
    ]
    if words == "bundled":
        answers = llm.generate(["In JSON: "] * len(made), wishes, use_tqdm=False)
    else:
        getattr(schemas, words)(tmp_path)
        with running(checkpoint("llama"), tokenizer=str(tmp_path), max_num_seqs=32) as random:
            answers = random.generate(["In JSON: "] * len(made), wishes, use_tqdm=False)
    found = texts(answers)
    finished = [number for number, answer in enumerate(answers) if answer.outputs[0].finish_reason == "stop"]
    assert len(finished) > SCHEMAS // 4
    for number in finished:
        jsonschema.validate(json.loads(found[number]), made[number], format_checker=FORMATS)


def test_kinds_and_what_they_go_with(llm: LLM) -> None:
    date = from_structured_outputs({"regex": r"(19|20)\d\d-(0[1-9]|1[0-2])"})
    choice = from_structured_outputs({"choice": ["cabin", "cabins", "tower é"]})
    words = re.compile("([a-z]{2,8} ){3,6}end")
    cases: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
        ({"grammar": date}, re.compile(r"\d{4}-\d\d").fullmatch),
        ({"grammar": choice}, ["cabin", "cabins", "tower é"].__contains__),
        ({"grammar": choice, "min_tokens": 50}, ["cabin", "cabins", "tower é"].__contains__),
        ({"grammar": choice, "ignore_eos": True}, ["cabins", "tower é"].__contains__),
        ({"grammar": from_lark('start: "a" b "c"\nb: "(" b ")" | /[0-9]/')}, re.compile(r"a\(*\d\)*c").fullmatch),
        ({"grammar": WORDS, "temperature": 0.0}, words.fullmatch),
        ({"grammar": WORDS, "top_k": 1, "repetition_penalty": 1.5, "presence_penalty": 1.0}, words.fullmatch),
        ({"grammar": WORDS, "top_p": 0.1, "min_p": 0.5, "logit_bias": {5: 90.0}}, words.fullmatch),
        ({"grammar": WORDS, "stop": ("end",)}, re.compile("([a-z]{2,8} ){3,6}").fullmatch),
        ({"grammar": WORDS, "stop": ("end",), "include_stop_str_in_output": True}, words.fullmatch),
    ]
    wishes = [SamplingParams(**{"max_tokens": 200, "seed": 7, **wish}) for wish, _ in cases]
    answers = llm.generate(["It is "] * len(cases), wishes, use_tqdm=False)
    for (wish, right), answer, text in zip(cases, answers, texts(answers), strict=True):
        assert answer.outputs[0].finish_reason == "stop", (wish, text)
        assert right(text), (wish, text)


def test_n_answers_differ_and_all_follow(llm: LLM) -> None:
    (answer,) = llm.generate(["a"], SamplingParams(max_tokens=200, seed=1, grammar=WORDS), n=6, use_tqdm=False)
    found = {output.text for output in answer.outputs}
    assert len(found) > 1
    assert all(re.fullmatch("([a-z]{2,8} ){3,6}end", text) for text in found)


def batch(llm: LLM, *, free: bool) -> list[str]:
    """Answers of grammar rows, and of free rows beside them or alone."""
    prompts = [f"{number} lines of rope: " * 3 for number in range(8)]
    wishes = [SamplingParams(max_tokens=48, seed=number, ignore_eos=True) for number in range(8)]
    if not free:
        guided = [SamplingParams(max_tokens=48, seed=number, grammar=[LIST, WORDS][number % 2]) for number in range(8)]
        prompts, wishes = prompts + prompts, [*wishes, *guided]
    return texts(llm.generate(prompts, wishes, use_tqdm=False))


@needs_native
def test_batching_preemption_and_chunks_change_nothing(llm: LLM) -> None:
    whole = batch(llm, free=False)
    assert batch(llm, free=True) == whole[:8]
    conditions: list[dict[str, Any]] = [
        {"num_kv_blocks": 16, "starved": True, "max_num_seqs": 8},
        {"num_kv_blocks": 16, "starved": True, "max_num_seqs": 8, "kv_host_gib": 0.01, "preemption_mode": "swap"},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5},
    ]
    for condition in conditions:
        with running("bundled", max_model_len=256, **condition) as other:
            assert batch(other, free=False) == whole, condition
            preemptions = other._engine.scheduler.counters.preemptions
            assert (preemptions > 0) == condition.get("starved", False)


def test_a_grammar_that_cannot_be_used_is_refused_before_anything_runs(llm: LLM) -> None:
    wishes = [SamplingParams(grammar=WORDS), SamplingParams(grammar=from_lark("start: ("))]
    with pytest.raises(RequestError) as caught:
        llm.generate(["a", "b"], wishes, use_tqdm=False)
    assert caught.value.param == "tools"


def test_contradictions_end_their_own_request(llm: LLM) -> None:
    ends = dict.fromkeys(range(3), -100.0)
    wishes = [
        SamplingParams(max_tokens=9, grammar=from_structured_outputs({"choice": ["yes"]}), logit_bias=ends),
        SamplingParams(max_tokens=9, grammar=from_structured_outputs({"choice": ["yes"]}), allowed_token_ids=(100,)),
        SamplingParams(max_tokens=200, grammar=WORDS, seed=3),
    ]
    first, second, third = llm.generate(["a"] * 3, wishes, use_tqdm=False)
    assert first.error is None  # a bias is a wish, not a ban
    assert first.outputs[0].text == "yes"
    assert isinstance(second.error, RequestError)
    assert third.error is None
    assert third.outputs[0].finish_reason == "stop"
