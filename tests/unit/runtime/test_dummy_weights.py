"""Random weights instead of a checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import prompt
from driver import Driver
from expert_checkpoints import EXPERTS
from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, ModelError
from ropeway.modelspec import load_spec
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.open import open_executor
from ropeway.runtime.weights.dummy import open_weights

Make = Callable[[str], Path]
KINDS = ["llama-biases", "llama-tied", "qwen3", "mixtral", "deepseek-v3"]


@pytest.fixture
def shape(checkpoint: Make, experts: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A directory with the config.json of a kind and nothing else."""

    def make(kind: str) -> Path:
        place = tmp_path / kind
        place.mkdir()
        made = experts if kind in EXPERTS else checkpoint
        (place / "config.json").write_bytes((made(kind) / "config.json").read_bytes())
        return place

    return make


def executor(directory: Path, **changes: Any) -> LocalExecutor:
    values: dict[str, Any] = {
        "num_kv_blocks": 20, "block_size": 8, "max_num_seqs": 2, "threads": 1, "max_model_len": 64, "seed": 3,
        "load_format": "dummy",
    } | changes  # fmt: skip
    return LocalExecutor(EngineConfig(model=str(directory), device="cpu", **values))


def answer(directory: Path, **changes: Any) -> list[int]:
    driver = Driver(executor(directory, **changes))
    line = driver.add(prompt(1, 20))
    driver.run([line], 12)
    assert line.fault is None
    return line.output


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_alone_is_enough_and_says_the_same_every_time(shape: Make, kind: str) -> None:
    directory = shape(kind)
    first = answer(directory)
    assert len(set(first)) > 1, "weights that mean nothing still tell tokens apart"
    assert answer(directory) == first
    assert answer(directory, seed=4) != first


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_they_are_quantized_as_a_checkpoint_would_be(shape: Make, quantization: str) -> None:
    found = executor(shape("llama-biases"), quantization=quantization)
    plain = executor(shape("qwen3"))
    assert f"Quantization: {quantization}" in " ".join(found.info.notes)
    for one in (found, plain):
        assert any("random" in note for note in one.info.notes), "whoever reads the banner must know"


def test_encoders_have_them_too(encoder: Make, tmp_path: Path) -> None:
    source = encoder("bert")
    for file in source.rglob("*.json"):
        target = tmp_path / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    found = open_executor(EngineConfig(model=str(tmp_path), device="cpu", load_format="dummy", threads=1))
    assert any("random" in note for note in found.info.notes)
    found.close()


def test_activations_stay_in_range_at_any_depth(shape: Make) -> None:
    directory = shape("qwen3")
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 40, "hidden_size": 96}
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    found = executor(directory, dtype="float32", kernel_level="0")  # whose steps are not one native call
    seen: list[torch.Tensor] = []
    model = found.runner.model
    logits = model.logits

    def spy(states: torch.Tensor) -> torch.Tensor:
        seen.append(states.float())
        return logits(states)

    model.logits = spy  # type: ignore[method-assign]
    driver = Driver(found)
    driver.run([driver.add(prompt(1, 20))], 4)
    assert seen
    assert all(0.1 < float(states.abs().mean()) < 10 for states in seen)


def test_without_the_setting_weights_must_be_there(shape: Make) -> None:
    with pytest.raises(ModelError, match="neither"):
        executor(shape("llama-tied"), load_format="auto")


def test_only_models_of_our_own_can_have_them(shape: Make) -> None:
    directory = shape("qwen3")
    spec = load_spec(directory, implementation="transformers")
    config = EngineConfig(model=str(directory), load_format="dummy")
    with pytest.raises(ConfigError, match="load_format is dummy"):
        open_weights(spec, config, torch.float32, torch.device("cpu"))
