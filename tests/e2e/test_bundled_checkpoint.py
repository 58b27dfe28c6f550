"""The checkpoint in the package, loaded by `transformers` as anybody would load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bundled_corpus.corpus import Document
from bundled_files import encode
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "src" / "ropeway" / "bundled"

CHATS = {
    "Hello": r"hello|hi\b",
    "What is continuous batching?": r"batch",
    "Which port does the server use?": r"8000",
    "How do I start the server?": r"make serve",
    "What is the population of Mars?": r"do not know|too hard|beyond me",
    "Thank you.": r"welcome|pleasure",
    "Tell me a story.": r"(named|called) [A-Z][a-z]+ .*\.",
    "Write a poem about the sea.": r"the sea .*\n",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BUNDLED, padding_side="left")


@pytest.fixture(scope="module")
def answers(tokenizer: Any) -> dict[str, list[int]]:
    """Greedy answers to `CHATS` as token ids, up to and with the end token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    chats = [[{"role": "user", "content": question}] for question in CHATS]
    prompt = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, do_sample=False, temperature=None, top_p=None, max_new_tokens=400)
    rows = out[:, prompt["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return {q: row[: row.index(end) + 1] if end in row else row for q, row in zip(CHATS, rows, strict=True)}


def test_package_directory_is_at_most_12_mb() -> None:
    sizes = {path.name: path.stat().st_size for path in BUNDLED.iterdir() if path.is_file()}
    assert sum(sizes.values()) <= 12_000_000, sizes
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"chat_template.jinja", "README.md"} <= set(sizes)


def test_weights_are_tied_bfloat16_of_the_configured_shape() -> None:
    from safetensors import safe_open

    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["head_dim"] % 16 == 0
    with safe_open(BUNDLED / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in names)
        rows, columns = weights.get_slice("model.embed_tokens.weight").get_shape()
    assert (rows, columns) == (config["vocab_size"], config["hidden_size"])
    assert sum(name.endswith("q_proj.weight") for name in names) == config["num_hidden_layers"]


def test_chat_template_renders_several_turns(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not tokenizer.apply_chat_template(turns, tokenize=False).endswith("assistant\n")


def test_training_rows_are_what_the_chat_template_renders(tokenizer: Any) -> None:
    turns = (
        {"role": "user", "content": "What is 74 + 7?"},
        {"role": "assistant", "content": "81"},
    )
    ids, weights = encode(Tokenizer.from_file(str(BUNDLED / "tokenizer.json")), Document("chat", turns))
    rendered = tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=True)["input_ids"]
    assert ids == rendered[: len(ids)]
    learned = [i for i, w in zip(ids, weights, strict=True) if w > 0]
    assert tokenizer.decode(learned) == "81<|im_end|>"


@pytest.mark.parametrize(
    "text", ["naïve café", "漢字 and ελληνικά", "🚡 cabins", "\ttabs\n\nlines  and   spaces", "12345"]
)
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("question", CHATS)
def test_it_answers_and_ends_by_itself(tokenizer: Any, answers: dict[str, list[int]], question: str) -> None:
    ids = answers[question]
    assert ids[-1] == tokenizer.eos_token_id
    assert re.search(CHATS[question], tokenizer.decode(ids), re.IGNORECASE), tokenizer.decode(ids)


def test_lengths_of_answers_differ(answers: dict[str, list[int]]) -> None:
    lengths = sorted(len(ids) for ids in answers.values())
    assert lengths[0] <= 10
    assert lengths[-1] >= 50
