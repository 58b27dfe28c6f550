"""What the service knows of a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ropeway import hub
from ropeway.errors import ConfigError, ModelError
from ropeway.service.loader import load_text


def test_the_bundled_model() -> None:
    text = load_text("bundled")
    assert [text.tokenizer.token_string(i) for i in text.eos_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert text.context_limit == 2048
    assert text.template is not None
    assert text.generation["temperature"] == 0.6
    assert load_text("bundled", max_model_len=100).context_limit == 100
    with pytest.raises(ConfigError, match="2048"):
        load_text("bundled", max_model_len=4096)


def test_tokenizer_and_template_may_come_from_elsewhere(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(hub.BUNDLED / "config.json", model)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_text(str(model))
    words = tmp_path / "words"
    words.mkdir()
    shutil.copy(hub.BUNDLED / "tokenizer.json", words)
    text = load_text(str(model), tokenizer=str(words))
    assert text.template is None
    assert text.eos_ids == (2,)
    assert load_text(str(model), tokenizer=str(words / "tokenizer.json")).tokenizer.vocab_size == 4096
    (tmp_path / "t.jinja").write_text("X")
    text = load_text(str(model), tokenizer=str(words), chat_template=str(tmp_path / "t.jinja"))
    assert text.template is not None
    assert text.template.sources == {"default": "X"}
    with pytest.raises(ModelError, match="does not exist"):
        load_text(str(model), tokenizer="/nowhere/at/all")
