"""What stands around another family's code: packed weights, other types, and checks that refuse what would be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from many_ways import WEIGHTS, logits, spread
from safetensors.torch import load_file, save_file

from checkpoints import prompt, reference
from generic_checkpoints import SEEING, save
from ropeway.config import EngineConfig
from ropeway.contract import Admit, Row, SamplingParams
from ropeway.errors import ModelError
from ropeway.runtime.gather import gather
from ropeway.runtime.local import LocalExecutor

VIA = {"model_impl": "transformers"}


def executor(directory: Path, **changes: Any) -> LocalExecutor:
    values = {"dtype": "float32", "threads": 1, "num_kv_blocks": 16, **VIA} | changes
    return LocalExecutor(EngineConfig(model=str(directory), **values))


@pytest.mark.parametrize("name", ["gemma", "gpt2", "olmo2"])
def test_weights_are_there_once(tmp_path: Path, name: str) -> None:
    """Tied or not, plain or transposed: what is packed is in no parameter any more."""
    directory = save(name, tmp_path)
    model = executor(directory).runner.model.model
    before = sum(p.numel() for p in reference(directory).parameters())
    lookup = {"gemma": 0, "gpt2": 256 * 64, "olmo2": 300 * 64}[name]  # positions, or an embedding of its own
    assert lookup <= sum(p.numel() for p in model.parameters()) < lookup + before / 50


@pytest.mark.parametrize("quantization", WEIGHTS)
@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_quantized_while_loading(tmp_path: Path, name: str, quantization: str) -> None:
    directory = save(name, tmp_path)
    tokens = prompt(4, 40)
    found = logits(directory, tokens, quantization=quantization, **VIA)
    assert 0 < spread(found, directory, tokens) < 2 * WEIGHTS[quantization]


@pytest.mark.parametrize("changes", [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["gemma3", "gpt-neox"])
def test_shorter_types(tmp_path: Path, name: str, changes: dict[str, str]) -> None:
    directory = save(name, tmp_path)
    tokens = prompt(5, 40)
    assert 0 < spread(logits(directory, tokens, **changes, **VIA), directory, tokens) < 0.1


def test_final_states(tmp_path: Path) -> None:
    """What vectors of a text are made of."""
    directory = save("cohere", tmp_path)
    runner = executor(directory).runner
    tokens = prompt(6, 20)
    runner.slots.admit(Admit(0, 0, 0, tokens, 20, 0, [0, 1], SamplingParams(), ()), 0)
    row = Row(0, 0, 0, 0, 20, True, [])
    runner.slots.extend(row)
    with torch.inference_mode():
        found = runner.model.hidden(gather([row], runner.slots, runner.lane), runner.kv.data)
        expected = reference(directory).model(torch.tensor([tokens])).last_hidden_state[0, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SEEING)
def test_images_are_left_out(tmp_path: Path, name: str) -> None:
    """A model that also sees is served as a model of text."""
    directory = save(name, tmp_path)
    tokens = [token % 290 for token in prompt(7, 40)]
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    found = logits(directory, tokens, model_impl="auto")
    assert float((found - expected).abs().max() / expected.std()) < 1e-3


def _previous_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that mixes each token with the one before, as a convolution does."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) + torch.roll(x, 1, dims=1))


def _biased_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    make = modeling_llama.create_causal_mask

    def biased(**arguments: Any) -> Any:
        mask = make(**arguments)
        return mask if mask is None else mask + 1.0

    monkeypatch.setattr(modeling_llama, "create_causal_mask", biased)


def _whole_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import LlamaConfig

    monkeypatch.setattr(LlamaConfig, "is_causal", False, raising=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_previous_token, "with paged attention its logits differ by"),
        (_biased_mask, "was changed"),
        (_whole_attention, "sees other tokens than all before it"),
    ],
)
def test_code_that_does_more_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], reason: str
) -> None:
    directory = save("llama", tmp_path)
    executor(directory)
    change(monkeypatch)
    with pytest.raises(ModelError, match=reason):
        executor(directory)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save("olmo", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'ropeway\[transformers\]'"):
        executor(directory)


def _edited(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {"AutoConfig": "x.Config"}}, "code from its own repository"),
        ({}, "does not know .* Try a newer one"),
    ],
)
def test_unknown_models(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    directory = _edited(save("olmo", tmp_path), model_type="not_yet_known", **changes)
    with pytest.raises(ModelError, match=reason):
        executor(directory)


def test_weights_that_do_not_belong(tmp_path: Path) -> None:
    directory = save("phi", tmp_path)
    path = directory / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.fc1.weight"
    for tensors, reason in (
        ({k: v for k, v in whole.items() if k != name}, f"lacks {name}"),
        ({**whole, "model.layers.1.extra.weight": torch.ones(2)}, "has, but .* has not, model.layers.1.extra.weight"),
        ({**whole, name: torch.ones(3, 64)}, "another shape"),
    ):
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ModelError, match=reason):
            executor(directory)


def test_config_of_other_heads(tmp_path: Path) -> None:
    """What was planned with is compared with what the code does."""
    directory = _edited(save("opt", tmp_path), num_key_value_heads=2)
    with pytest.raises(ModelError, match=r"layers have \(4, 4, 16\) heads.* config.json says \(4, 2, 16\)"):
        executor(directory)
