"""Encoders' configurations, and what sentence-transformers keeps beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from encoder_checkpoints import ENCODERS, LONGEST, write_pooling
from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, MemoryBudgetError, ModelError
from ropeway.modelspec import EncoderSpec, PoolingSpec, load_spec, read_pooling
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.memory import MemoryState, plan_budget

Make = Callable[[str], Path]


def changed(directory: Path, **values: Any) -> Path:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


@pytest.fixture
def bert(encoder: Make, tmp_path: Path) -> Path:
    return copytree(encoder("bert"), tmp_path / "bert")


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_layout_is_read(encoder: Make, kind: str) -> None:
    spec = load_spec(encoder(kind))
    assert isinstance(spec, EncoderSpec)
    assert (spec.judges, spec.context_limit) == (kind.endswith("judge"), LONGEST)
    assert spec.kv_bytes_per_token("float32") == 0
    # BertModel's pooler and BertForMaskedLM's head are stored and not used.
    assert spec.stored_parameters is not None
    unused = {"bert": 48 * 49, "roberta": 48 * 49, "xlm-roberta": 48 * 49, "bert-inside": 48 * 51 + 100}
    assert spec.parameters == spec.stored_parameters - unused.get(kind, 0)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "swish2"}, "hidden_act"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"architectures": ["BertForSequenceClassification"]}, "2 labels"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            "awq.*with --quantization int4",
        ),
        ({"architectures": ["RobertaModel"], "pad_token_id": -1}, "pad_token_id .*must be a token id"),
        (
            {"architectures": ["RobertaModel"], "max_position_embeddings": 2, "pad_token_id": 1},
            "max_position_embeddings .*must be above 2",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(bert: Path, values: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        load_spec(changed(bert, **values))


@pytest.mark.parametrize(("name", "sigmoid"), [(None, True), ("torch.nn.modules.linear.Identity", False)])
def test_scores_go_through_what_the_checkpoint_says(
    encoder: Make, tmp_path: Path, name: str | None, sigmoid: bool
) -> None:
    directory = changed(copytree(encoder("bert-judge"), tmp_path / "j"), sbert_ce_default_activation_function=name)
    spec = load_spec(directory)
    assert isinstance(spec, EncoderSpec)
    assert spec.sigmoid is sigmoid
    with pytest.raises(ModelError, match="Softmax"):
        load_spec(changed(directory, sentence_transformers={"activation_fn": "torch.nn.Softmax"}))


def test_pooling_is_the_checkpoint_s(bert: Path) -> None:
    assert read_pooling(bert, "cls") == PoolingSpec("cls", True)
    write_pooling(bert, "mean_tokens", longest=20)
    spec = load_spec(bert)
    assert isinstance(spec, EncoderSpec)
    assert spec.pooling == PoolingSpec("mean", True, 20)
    assert spec.context_limit == 20
    write_pooling(bert, "lasttoken", normalize=False)
    assert read_pooling(bert, "cls") == PoolingSpec("last", False, 20)
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": true}')
    assert read_pooling(bert, "cls").kind == "mean"


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "Dense"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../other"}]', "not inside"),
        ("modules.json", "[1]", "list of modules"),
        ("modules.json", "[", "cannot be read"),
        ("modules.json", "[" + " " * 2**20 + "]", "no list of modules has"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}', "mean"),
        ("1_Pooling/config.json", "{}", "no kind"),
    ],
)
def test_an_unknown_pooling_is_refused(bert: Path, file: str, content: str, word: str) -> None:
    write_pooling(bert, "mean_tokens")
    (bert / file).write_text(content)
    with pytest.raises(ModelError, match=word):
        load_spec(bert)


def test_its_budget_has_no_cache(encoder: Make) -> None:
    spec = load_spec(encoder("bert"))
    memory = MemoryState(2**30, 2**30, "of memory")
    budget = plan_budget(EngineConfig(max_num_seqs=4, block_size=16), spec, "float32", "cpu", memory)
    assert (budget.kv_bytes, budget.num_blocks, budget.max_model_len) == (0, 4 * LONGEST // 16, LONGEST)
    assert isinstance(spec, EncoderSpec)
    linears = sum(outs * ins for outs, ins in spec.linears)
    saved = spec.weight_bytes("float32") - spec.weight_bytes("float32", "int8")
    assert 2.8 * linears < saved < 3 * linears
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        plan_budget(EngineConfig(kv_cache_gib=1.0), spec, "float32", "cpu", memory)
    with pytest.raises(MemoryBudgetError, match="weights"):
        plan_budget(EngineConfig(), spec, "float32", "cpu", MemoryState(2**30, 1000, "of memory"))


def test_it_is_not_asked_to_generate(encoder: Make) -> None:
    with pytest.raises(ModelError, match="generates no text"):
        LocalExecutor(EngineConfig(model=str(encoder("bert"))))
