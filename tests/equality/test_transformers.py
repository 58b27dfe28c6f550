"""Token for token what transformers generates in float32, however the work is cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from checkpoints import KINDS, greedy, prompt, reference
from driver import Driver
from ropeway.config import EngineConfig
from ropeway.runtime.local import LocalExecutor

Make = Callable[[str], Path]
NUMBER = 20
LENGTHS = (5, 17, 33, 58)


def driver(directory: Path, backend: str = "auto", dtype: str = "float32", device: str = "cpu") -> Driver:
    config = EngineConfig(
        model=str(directory), dtype=dtype, device=device, num_kv_blocks=80, block_size=8, max_num_seqs=8, threads=1,
        attention_backend=backend, max_model_len=128,
    )  # fmt: skip
    return Driver(LocalExecutor(config))


@cache
def expected(directory: Path, length: int) -> list[int]:
    return greedy(directory, prompt(length, length), NUMBER)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_alone(checkpoint: Make, kind: str, backend: str) -> None:
    directory = checkpoint(kind)
    for length in (5, 58):
        d = driver(directory, backend)
        line = d.add(prompt(length, length))
        d.run([line], NUMBER)
        assert line.output == expected(directory, length)


@pytest.mark.parametrize("chunk", [3, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_in_chunks(checkpoint: Make, kind: str, chunk: int) -> None:
    """Sequences join at different times, so that prefill chunks and decodes of all ages share steps."""
    directory = checkpoint(kind)
    d = driver(directory)
    lines = []
    for length in LENGTHS:
        lines.append(d.add(prompt(length, length)))
        d.step([(line, chunk) for line in lines])
        d.step([(line, chunk) for line in reversed(lines)])
    d.run(lines, NUMBER, chunk=chunk)
    for line, length in zip(lines, LENGTHS, strict=True):
        assert line.output[:NUMBER] == expected(directory, length)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_blocks_are_shared(checkpoint: Make, kind: str) -> None:
    """A second sequence starts on the blocks that the first has computed, while the first still runs."""
    directory = checkpoint(kind)
    d = driver(directory)
    first = d.add(prompt(58, 58))
    d.run([first], 3, chunk=11)
    changed = prompt(58, 58)[:40] + prompt(1, 9)
    second = d.add(changed, shared=first.blocks[:5])
    third = d.add(prompt(58, 58), shared=first.blocks[:7])
    d.run([second, first, third], NUMBER, chunk=4)
    assert first.output[:NUMBER] == third.output == expected(directory, 58)
    assert second.output == greedy(directory, changed, NUMBER)


@pytest.mark.parametrize("kind", KINDS)
def test_preempted_and_resumed(checkpoint: Make, kind: str) -> None:
    """Put back twice: once with two blocks still cached, once with none; its old blocks hold others' tokens by then."""
    directory = checkpoint(kind)
    d = driver(directory)
    line, other = d.add(prompt(33, 33)), d.add(prompt(17, 17))
    d.run([line, other], 6, chunk=9)
    kept = d.remove(line, keep=2)
    d.run([other], 9)
    d.readmit(line, shared=kept)
    d.run([line, other], 12, chunk=9)
    d.remove(line)
    third = d.add(prompt(58, 58))
    d.run([third], 4)
    d.readmit(line)
    d.run([line, other, third], NUMBER, chunk=5)
    for found, length in ((line, 33), (other, 17), (third, 58)):
        assert found.output[:NUMBER] == expected(directory, length)


def test_dynamic_rope_beyond_the_trained_length(checkpoint: Make) -> None:
    """From a prompt within the limit far beyond it: each position takes the base of its own length."""
    directory = checkpoint("dynamic")
    d = driver(directory)
    line = d.add(prompt(58, 58))
    d.run([line], 60)
    assert line.output == greedy(directory, prompt(58, 58), 60)


def test_dynamic_rope_with_a_prompt_beyond_the_trained_length(checkpoint: Make) -> None:
    """There transformers rotates by the longest length in the batch. Here the text is one and the same in one piece,
    in chunks, and on blocks that a shorter sequence has left."""
    directory = checkpoint("dynamic")
    d = driver(directory)
    whole = d.add(prompt(9, 90))
    d.run([whole], NUMBER)
    short = d.add(prompt(9, 90)[:70])
    d.run([short], 2)
    shared, chunked = d.add(prompt(9, 90), shared=short.blocks[:8]), d.add(prompt(9, 90))
    d.run([chunked, short, shared], NUMBER, chunk=7)
    assert whole.output == chunked.output == shared.output


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "qwen3", "mistral-window", "llama-tied"])
def test_bfloat16_logits(checkpoint: Make, kind: str, backend: str) -> None:
    """Against float32, the mean error of logits in bfloat16 is at most a quarter above that of transformers."""
    directory = checkpoint(kind)
    tokens = prompt(7, 60)
    d = driver(directory, backend, dtype="bfloat16")
    model = d.executor.runner.model
    forward, seen = model.forward, []
    model.forward = lambda inputs, kv: seen.append(forward(inputs, kv)) or seen[-1].clone()
    ends = range(1, 61, 8)
    lines = [d.add(tokens[:end]) for end in ends]
    for _ in range(5):
        d.step([(line, 13) for line in lines if line.computed < line.prompt_len])
    found = torch.cat(seen)
    order = [end - 1 for step in range(5) for end in ends if -(-end // 13) == step + 1]
    with torch.no_grad():
        exact = reference(directory)(torch.tensor([tokens])).logits[0, order]
        rounded = reference(directory, torch.bfloat16)(torch.tensor([tokens])).logits[0, order].float()
    theirs, ours = (rounded - exact).abs().mean(), (found - exact).abs().mean()
    assert found.shape == exact.shape
    assert ours < 1.25 * theirs
