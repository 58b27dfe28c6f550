"""Datasets: lengths, seeds, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropeway.bench.config import DatasetConfig
from ropeway.bench.datasets import FileTokens, Sample, Words
from ropeway.errors import ConfigError


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> FileTokens:
    """A small real BPE vocabulary in which common words take one to three tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the water of the people was down before there were many words"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return FileTokens(str(path.parent))


def test_random_prompts_have_the_asked_length_in_tokens(subwords: FileTokens) -> None:
    samples = DatasetConfig(num_prompts=20, random_input_len=37, random_output_len=9).samples(subwords)
    lengths = [len(subwords.encode(sample.prompt)) for sample in samples]
    assert [sample.prompt_len for sample in samples] == lengths
    assert sum(length == 37 for length in lengths) >= 18
    assert all(abs(length - 37) <= 1 for length in lengths)
    assert {sample.output_len for sample in samples} == {9}
    assert len({sample.prompt for sample in samples}) == 20


def test_prompts_grow_until_they_have_enough_tokens_of_several_words(tmp_path: Path) -> None:
    """A vocabulary that takes two words for one token, as those of some languages do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"pair": 0}, unk_token="pair"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+( \w+)?"), "removed", invert=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    samples = DatasetConfig(num_prompts=5, random_input_len=16).samples(FileTokens(str(tmp_path / "tokenizer.json")))
    assert {sample.prompt_len for sample in samples} == {16}
    assert all(len(sample.prompt.split()) in (31, 32) for sample in samples)


def test_random_lengths_stay_in_range_and_share_the_prefix() -> None:
    config = DatasetConfig(
        num_prompts=200, random_input_len=100, random_output_len=50, random_range_ratio=0.2, random_prefix_len=10
    )
    samples = config.samples(Words())
    assert samples == config.samples(Words())
    assert all(90 <= s.prompt_len <= 130 and 40 <= s.output_len <= 60 for s in samples)
    assert len({s.prompt_len for s in samples}) > 20
    assert len({tuple(s.prompt.split()[:10]) for s in samples}) == 1


def test_prefix_repetition_spreads_prompts_over_prefixes() -> None:
    config = DatasetConfig(
        dataset_name="prefix_repetition", num_prompts=12, prefix_repetition_num_prefixes=3,
        prefix_repetition_prefix_len=20, prefix_repetition_suffix_len=5, prefix_repetition_output_len=7,
    )  # fmt: skip
    samples = config.samples(Words())
    counts: dict[str, int] = {}
    for sample in samples:
        prefix = " ".join(sample.prompt.split()[:20])
        counts[prefix] = counts.get(prefix, 0) + 1
    assert sorted(counts.values()) == [4, 4, 4]
    assert {(s.prompt_len, s.output_len) for s in samples} == {(25, 7)}


def test_sharegpt_takes_first_turns_and_leaves_out_extremes(tmp_path: Path) -> None:
    def talk(*texts: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    path = tmp_path / "talks.json"
    long = "word " * 1100
    talks = [talk("a b c d e", "f g h i"), talk("too", "short"), talk("alone"), talk(long, "a b c d"), {"other": 1}]
    path.write_text(json.dumps(talks))
    config = DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=2)
    assert config.samples(Words()) == [Sample("a b c d e", 5, 4)] * 2
    path.write_text(json.dumps([talk(f"a b c d {n}", "f g h i") for n in range(20)]))
    assert len({sample.prompt for sample in config.samples(Words())}) == 2, "no more are taken than asked for"


def test_custom_lines_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "one two", "output_tokens": 5}\n\n{"prompt": "three"}\n')
    config = DatasetConfig(dataset_name="custom", dataset_path=str(path), num_prompts=3, custom_output_len=8)
    assert [(s.prompt, s.output_len) for s in config.samples(Words())] == [("one two", 5), ("three", 8), ("one two", 5)]
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\nnot read any more')
    first = DatasetConfig(dataset_name="custom", dataset_path=str(path), num_prompts=2)
    assert [sample.prompt for sample in first.samples(Words())] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("custom", '{"text": "x"}', "line 1"),
        ("custom", "{", "cannot be read"),
        ("custom", "", "no usable prompt"),
        ("sharegpt", "{}", "JSON list"),
        ("sharegpt", None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / "data"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(dataset_name=name, dataset_path=str(path)).samples(Words())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--dataset-path"):
        DatasetConfig(dataset_name=name).samples(Words())  # type: ignore[arg-type]
