"""Families with experts: token for token what transformers generates in float32, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from many_ways import CONDITIONS, LENGTHS, ROUNDING, Run, executor, expected, in_many_ways, logits, spread
from safetensors.torch import load_file

from checkpoints import prompt
from expert_checkpoints import EXPERTS, rewritten, stacked
from ropeway.errors import ConfigError, ModelError
from ropeway.modelspec import load_spec
from ropeway.runtime.weights.export import write_quantized
from ropeway.runtime.weights.quant import quantize_int8, rounding

Make = Callable[[str], Path]
native = partial(executor, model_impl="native")
NEAR = {"int8": 0.3, "int4": 0.9}
"""Rounded weights change some choices of experts, and with them logits as a whole, so this is no more than near."""


@pytest.mark.parametrize("kind", EXPERTS)
def test_equals_generate(experts: Make, kind: str) -> None:
    in_many_ways(native(experts(kind)), experts(kind))


@pytest.mark.parametrize("level", ["0", "1"])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek-v3"])
def test_equals_generate_without_native_kernels(experts: Make, kind: str, level: str) -> None:
    in_many_ways(native(experts(kind), kernel_level=level), experts(kind))


@pytest.mark.parametrize("depth", ["1", "2"])
@pytest.mark.parametrize("condition", ["chunks-of-7", "starved"])
@pytest.mark.parametrize("kind", ["qwen3-moe", "deepseek-v3"])
def test_in_the_whole_engine(experts: Make, kind: str, condition: str, depth: str) -> None:
    directory = experts(kind)
    run = Run(directory, blind="starved" in condition, pipeline_depth=depth, **CONDITIONS[condition])
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length), priority=rid % 3)
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length)))
    if "starved" in condition:
        assert run.engine.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("kind", ["mixtral", "deepseek-v2"])
def test_prefix_hits_and_swapping(experts: Make, kind: str) -> None:
    directory = experts(kind)
    run = Run(directory, blind=True, num_kv_blocks=14, kv_host_gib=0.01, preemption_mode="swap")
    tokens = [prompt(40, 40), prompt(40, 40)[:31], prompt(40, 40)[:20] + prompt(2, 30), *map(prompt, (9, 7), (9, 33))]
    for rid, asked in enumerate(tokens):
        run.ask(rid, asked)
        run.steps(3)
    run.steps()
    for rid, asked in enumerate(tokens):
        assert run.tokens[rid] == expected(directory, tuple(asked))
    scheduler = run.engine.scheduler
    assert scheduler.counters.cache_hits > 0
    assert sum(shelf.hits for shelf in scheduler.memory.lower) > 0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_stacked_experts_are_the_same(experts: Make, tmp_path: Path, kind: str) -> None:
    directory = stacked(experts(kind), tmp_path / "stacked")
    assert load_spec(directory).parameters == load_spec(directory).stored_parameters
    tokens = prompt(6, 30)
    assert torch.equal(logits(directory, tokens), logits(experts(kind), tokens))
    with pytest.raises(ConfigError, match=r"does not store .* as a matrix of its own"):
        write_quantized(load_spec(directory), tmp_path / "out", "int8", 64, rounding("int8", 64))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", EXPERTS)
def test_plans_what_is_loaded(experts: Make, kind: str) -> None:
    spec = load_spec(experts(kind), kind, "native")
    assert spec.parameters == spec.stored_parameters > spec.active_parameters
    loaded = native(experts(kind))
    assert loaded.info.weight_bytes == 4 * spec.parameters
    block = loaded.runner.kv.data[0]
    assert block.numel() * block.element_size() == 8 * spec.kv_bytes_per_token("float32")
    assert sum(f" of {spec.experts.count} for each token" in note for note in loaded.info.notes) == 1  # type: ignore[union-attr]
    assert f"{spec.active_parameters:,} parameters" in " ".join(loaded.info.notes)


@pytest.mark.parametrize("quantization", NEAR)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "deepseek-v2-lite"])
def test_quantized_while_loading_and_on_disk(experts: Make, tmp_path: Path, kind: str, quantization: str) -> None:
    """Both are the same weights but for the LM head. Near float32 only loosely: rounding changes who is chosen."""
    directory, tokens = experts(kind), prompt(4, 40)
    found = logits(directory, tokens, quantization=quantization, quantization_group=32)
    assert 0 < spread(found, directory, tokens) < NEAR[quantization]
    spec = load_spec(directory)
    write_quantized(spec, tmp_path / "out", quantization, 32, rounding(quantization, 32))
    stored = load_spec(tmp_path / "out")
    assert stored.parameters == spec.parameters == stored.stored_parameters
    assert stored.weight_bytes("float32") < spec.weight_bytes("float32")
    again = logits(tmp_path / "out", tokens)
    assert float((again - found).pow(2).mean().sqrt() / found.std()) < ROUNDING


def test_an_expansion_that_is_stored_in_bytes_is_widened(experts: Make, tmp_path: Path) -> None:
    """Other tools quantize `kv_b_proj` too."""
    source, tokens = experts("deepseek-v3"), prompt(4, 30)
    write_quantized(load_spec(source), tmp_path / "out", "int8", 64, rounding("int8", 64))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in tensors if "kv_b_proj" in name]:
        found = quantize_int8(tensors[name])
        tensors |= {name: found.values, f"{name}_scale": found.scales[:, None]}
    directory = rewritten(tmp_path / "out", tmp_path / "more", tensors)
    spec = load_spec(directory)
    assert spec.parameters == spec.stored_parameters
    assert spec.weight_bytes("float32") == load_spec(tmp_path / "out").weight_bytes("float32")
    found, expected = logits(directory, tokens), logits(tmp_path / "out", tokens)
    assert 0 < float((found - expected).pow(2).mean().sqrt() / expected.std()) < NEAR["int8"]


def test_bfloat16_is_near(experts: Make) -> None:
    for kind in ("qwen3-moe", "deepseek-v3"):
        tokens = prompt(8, 30)
        assert spread(logits(experts(kind), tokens, dtype="bfloat16"), experts(kind), tokens) < 0.25


def test_layers_that_predict_further_tokens_are_left_out(experts: Make, tmp_path: Path) -> None:
    source = experts("deepseek-v3")
    tensors = load_file(source / "model.safetensors")
    more = {f"model.layers.3.{name}": torch.ones(4, 4) for name in ("eh_proj.weight", "shared_head.head.weight")}
    directory = rewritten(source, tmp_path / "more", tensors | more)
    spec = load_spec(directory)
    assert spec.parameters == spec.stored_parameters
    assert torch.equal(logits(directory, prompt(1, 9)), logits(source, prompt(1, 9)))


def test_a_missing_expert_is_named(experts: Make, tmp_path: Path) -> None:
    tensors = load_file(experts("qwen3-moe") / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    directory = rewritten(experts("qwen3-moe"), tmp_path / "less", tensors)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight"):
        native(directory)
