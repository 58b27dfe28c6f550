"""Families without native code: token for token what transformers generates, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from many_ways import CONDITIONS, LENGTHS, Run, executor, expected, in_many_ways

from checkpoints import prompt
from generic_checkpoints import FAMILIES, REFUSED, save
from ropeway.errors import ModelError
from ropeway.modelspec import GenericSpec, load_spec

Make = Callable[[str], Path]
foreign = partial(executor, model_impl="transformers")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint by the name of its family, made once."""
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_generate(family: Make, name: str) -> None:
    directory = family(name)
    in_many_ways(foreign(directory), directory)


@pytest.mark.parametrize("condition", ["chunks-of-7", "starved", "static", "level-0-starved"])
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen2-moe"])
def test_in_the_whole_engine(family: Make, name: str, condition: str) -> None:
    directory = family(name)
    run = Run(directory, blind="starved" in condition, **CONDITIONS[condition])
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length), priority=rid % 3)
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length)))
    if "starved" in condition:
        assert run.engine.scheduler.counters.preemptions > 0


def test_swapped_out_and_back(family: Make) -> None:
    directory = family("gemma3")
    run = Run(
        directory, blind=True, num_kv_blocks=12, max_num_batched_tokens=24, kv_host_gib=0.01, preemption_mode="swap"
    )
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length))
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length)))
    assert sum(shelf.hits for shelf in run.engine.scheduler.memory.lower) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_what_is_loaded(family: Make, name: str) -> None:
    spec = load_spec(family(name), name, "transformers")
    assert isinstance(spec, GenericSpec)
    assert spec.parameters == spec.stored_parameters
    assert (spec.context_limit, spec.vocab, spec.layers) == (256, 300, 3)
    assert (2 in spec.eos_ids) == (spec.bos_id == 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("falcon-alibi", "ALiBi"),
        ("bloom", "ALiBi"),
        ("falcon", "not through transformers' attention interface"),
        ("mamba", "a state of their own"),
        ("lfm2", "conv"),
        ("llama4", "chunked_attention"),
        ("gpt-oss", "its attention takes s_aux"),
        ("deepseek-v3", "multi-head latent attention"),
        ("t5", "an encoder beside its decoder"),
    ],
)
def test_refused_with_the_reason(family: Make, name: str, reason: str) -> None:
    assert name in REFUSED
    with pytest.raises(ModelError, match=reason):
        foreign(family(name))
