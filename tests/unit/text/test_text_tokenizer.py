"""Loading vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropeway import hub
from ropeway.errors import ModelError, RequestError
from ropeway.text.detokenizer import byte_alphabet, compile_rule
from ropeway.text.tokenizer import ByteTokenizer, HubTokenizer


def test_the_bundled_vocabulary_round_trips() -> None:
    tokenizer = HubTokenizer.load(hub.BUNDLED)
    for text in ("Hello, world!", "  naïve 你好 🎉\n\n", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text, False), False) == text
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.token_string(tokenizer.eos_id) == "<|im_end|>"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.token_string(10**9) == ""
    assert tokenizer.token_bytes(10**9) == b""
    assert max(map(len, (tokenizer.token_string(i) for i in range(tokenizer.vocab_size)))) == tokenizer.max_chars


def test_truncation_of_a_training_run_is_not_applied(tmp_path: Path) -> None:
    data = json.loads((hub.BUNDLED / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(HubTokenizer.load(tmp_path).encode("one two three four five", False)) > 2


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="save_pretrained"):
        HubTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        HubTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((hub.BUNDLED / "tokenizer.json").read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read: .*Download it again"):
        HubTokenizer.load(tmp_path)
    settings.write_text("[]")
    with pytest.raises(ModelError, match="must be a JSON object, not a list"):
        HubTokenizer.load(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "CTC"}, {"type": "Sequence", "decoders": 3},
                                     {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
                                     {"type": "Replace", "pattern": {"Regex": "x"}, "content": "y"}])  # fmt: skip
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: object) -> None:
    with pytest.raises(ModelError):
        compile_rule(decoder)


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("hé")
    assert ids == [256, 104, 195, 169]
    assert tokenizer.decode(ids) == "hé"
    assert tokenizer.decode([*ids, 257], False) == "<|begin|>hé<|end|>"
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("\ud800")
