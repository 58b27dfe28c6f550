"""What to ask: prompts and answer lengths, drawn from a seed or read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from ropeway.errors import ConfigError

_COMMON = (
    "the a of to and in is it that was for on are with they be at one have this from by hot but some what there we can "
    "out other were all your when up use word how said each she which do their time if will way about many then them "
    "would write like so these her long make thing see him two has look more day could go come did my sound no most "
    "number who over know water than call first people may down side been now find any new work part take get place "
    "made live where after back little only round man year came show every good me give our under name very through "
    "just form much great think say help low line before turn cause same mean differ move right boy old too does tell"
)
WORDS = _COMMON.split()


@dataclass(frozen=True)
class Sample:
    """One request to send. `prompt_len` is in tokens, or in words when there was no tokenizer to count with; what is
    reported is the server's own count."""

    prompt: str
    prompt_len: int
    output_len: int


class Tokens(Protocol):
    """Enough of a tokenizer to make prompts of a given length."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Words:
    """Stands in for a tokenizer: a token is a common word. Most vocabularies hold each of them as one token."""

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i % len(WORDS)] for i in ids)


class FileTokens:
    """A `tokenizer.json`, from a directory or a hub name."""

    def __init__(self, name: str) -> None:
        from tokenizers import Tokenizer

        path = Path(name)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._tokenizer = Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(name)
        except Exception as error:
            raise ConfigError(f"The tokenizer {name!r} cannot be loaded: {error}. Check --tokenizer.") from None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


def text_of_length(tokens: Tokens, length: int, rng: np.random.Generator) -> str:
    """Random words that `tokens` counts as `length`, or as close as a few corrections come."""
    if length <= 0:
        return ""
    text = " ".join(rng.choice(WORDS, size=length))
    for _ in range(8):
        ids = tokens.encode(text)
        if len(ids) == length:
            break
        if len(ids) > length:
            text = text.rsplit(" ", 1)[0] if len(ids) == length + 1 and " " in text else tokens.decode(ids[:length])
        else:
            text += " " + " ".join(rng.choice(WORDS, size=length - len(ids)))
    return text


def random(
    tokens: Tokens,
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Lengths uniform within `range_ratio` of the given ones; `prefix_len` tokens are common to all prompts."""
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"random-range-ratio is {range_ratio}; it must be at least 0 and below 1.")
    rng = np.random.default_rng(seed)
    prefix = text_of_length(tokens, prefix_len, rng)

    def around(length: int) -> int:
        low, high = int(length * (1 - range_ratio)), int(np.ceil(length * (1 + range_ratio)))
        return max(1, int(rng.integers(low, high + 1)))

    samples = []
    for _ in range(count):
        body = text_of_length(tokens, around(input_len), rng)
        prompt = f"{prefix} {body}" if prefix else body
        samples.append(Sample(prompt, len(tokens.encode(prompt)), around(output_len)))
    return samples


def mixed_lengths(
    count: int, prompts: tuple[int, int], outputs: tuple[int, int], median: float
) -> list[tuple[int, int]]:
    """(prompt, output) of `count` requests: evenly spaced quantiles of a uniform distribution over `prompts` and of a
    lognormal one with this median and sigma 0.6, cut to `outputs`, paired at random, always in the same way. So any
    number of requests has the same distribution."""
    order, output = Random(0), NormalDist(math.log(median), 0.6)
    low, high = (output.cdf(math.log(bound)) for bound in outputs)
    shares = [(i + 0.5) / count for i in range(count)]
    asked = [round(prompts[0] + (prompts[1] - prompts[0]) * share) for share in shares]
    answered = [round(math.exp(output.inv_cdf(low + (high - low) * share))) for share in shares]
    order.shuffle(asked)
    order.shuffle(answered)
    return list(zip(asked, answered, strict=True))


def prefix_repetition(
    tokens: Tokens, count: int, *, prefix_len: int, suffix_len: int, num_prefixes: int, output_len: int, seed: int = 0
) -> list[Sample]:
    """`num_prefixes` common beginnings, shared evenly by `count` prompts with endings of their own, shuffled."""
    if not 1 <= num_prefixes <= count:
        raise ConfigError(
            f"prefix-repetition-num-prefixes is {num_prefixes}; it must be from 1 to {count} (num-prompts)."
        )
    rng = np.random.default_rng(seed)
    prefixes = [text_of_length(tokens, prefix_len, rng) for _ in range(num_prefixes)]
    samples = []
    for i in range(count):
        prompt = f"{prefixes[i % num_prefixes]} {text_of_length(tokens, suffix_len, rng)}"
        samples.append(Sample(prompt, len(tokens.encode(prompt)), output_len))
    return [samples[i] for i in rng.permutation(count)]


def sharegpt(tokens: Tokens, count: int, path: Path, *, output_len: int | None = None, seed: int = 0) -> list[Sample]:
    """First question and answer of conversations in ShareGPT's JSON; very short and very long ones are left out."""
    rng = np.random.default_rng(seed)
    conversations = _read_json(path)
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} must hold a JSON list of conversations.", param="dataset_path")
    samples: list[Sample] = []
    for i in rng.permutation(len(conversations)):
        turns = conversations[i].get("conversations", []) if isinstance(conversations[i], dict) else []
        if len(samples) == count:
            break
        if len(turns) < 2:
            continue
        prompt, answer = str(turns[0].get("value", "")), str(turns[1].get("value", ""))
        asked, answered = len(tokens.encode(prompt)), output_len or len(tokens.encode(answer))
        if asked >= 4 and answered >= 4 and asked <= 1024 and asked + answered <= 2048:
            samples.append(Sample(prompt, asked, answered))
    return _enough(samples, count, path)


def custom(tokens: Tokens, count: int, path: Path, *, output_len: int = 256) -> list[Sample]:
    """JSON lines with `prompt` and, optionally, `output_tokens`; in order."""
    samples = []
    for number, record in _read_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ConfigError(f"{path}, line {number}: expected a JSON object with a text field 'prompt'.")
        length = int(record.get("output_tokens") or output_len)
        samples.append(Sample(record["prompt"], len(tokens.encode(record["prompt"])), length))
        if len(samples) == count:
            break
    return _enough(samples, count, path)


def _enough(samples: list[Sample], count: int, path: Path) -> list[Sample]:
    if not samples:
        raise ConfigError(f"{path} has no usable prompt. Check --dataset-name.", param="dataset_path")
    return [samples[i % len(samples)] for i in range(count)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The dataset {path} cannot be read: {error}. Check --dataset-path.") from None


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The dataset {path} cannot be read: {error}. Check --dataset-path.") from None
