"""What every engine is asked, and what the machine could do at best.

W1 is 64 mixed requests put in at once, W2 is 64 that share their first 512 tokens, W3 is one stream, W4 is W1's
requests arriving as a Poisson process. Lengths are always the same; token ids come from a seed of their own for each
round, so that no prefix cache answers from an earlier one.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from protocol import Job, Request

from ropeway.bench.datasets import mixed_lengths

REQUESTS = 64
SHARED = 512


def lengths() -> list[tuple[int, int]]:
    """(prompt, output) of each of W1's requests."""
    return mixed_lengths(REQUESTS, prompts=(32, 256), outputs=(16, 256), median=84)


def make(name: str, vocab: int, seed: int) -> Job:
    """The requests of W0 (a warm-up), W1, W2 or W3; the first ids are left out, they are often special."""
    rng = random.Random(f"{name} {seed}")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(16, vocab) for _ in range(count)]

    if name == "W0":
        return Job([Request(tokens(32 * (i + 1)), 8) for i in range(8)])
    if name == "W1":
        return Job([Request(tokens(prompt), output) for prompt, output in lengths()])
    if name == "W2":
        shared = tokens(SHARED)
        return Job([Request(shared + tokens(32), 32) for _ in range(REQUESTS)], shared=SHARED)
    if name == "W3":
        return Job([Request(tokens(128), 128)])
    raise ValueError(f"{name!r} is none of W0, W1, W2 and W3")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that bound its speed: parameters of layers and of the head, and of attention."""

    body: int
    head: int
    layers: int
    queries: int
    keys: int
    vocab: int

    @classmethod
    def read(cls, model: Path) -> Shape:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        dim = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        body = layers * (2 * hidden * (queries + keys) + 3 * hidden * config["intermediate_size"])
        return cls(body, hidden * config["vocab_size"], layers, queries, keys, config["vocab_size"])


@dataclass(frozen=True)
class Bound:
    """Tokens/s of output that nothing on this machine could exceed: over a whole job, and after the first token."""

    output: float
    decode: float


def bound(shape: Shape, job: Job, weight_bytes: float, read: float, peak: float) -> Bound:
    """The roofline of a job, for a reading rate in bytes/s and an arithmetic rate in FLOP/s.

    The scheduler is ideal: everybody is admitted at once, prompts are computed together, a shared prefix once. A step
    takes the longer of reading (weights, and the bfloat16 keys and values of all contexts) and computing.
    """
    reading = (shape.body + shape.head) * weight_bytes
    cached = 2 * 2 * shape.keys * shape.layers

    def attention(context: float) -> float:
        return 4 * shape.queries * shape.layers * context

    def fresh(start: int, end: int) -> float:
        return (end - start) * 2 * shape.body + attention((end * (end - 1) - start * (start - 1)) / 2)

    flops = fresh(0, job.shared) + sum(fresh(job.shared, len(r.prompt)) for r in job.requests)
    flops += len(job.requests) * 2 * shape.head
    first = seconds = max(flops / peak, reading / read)
    for made in range(1, max(r.max_tokens for r in job.requests)):
        contexts = [len(r.prompt) + made for r in job.requests if r.max_tokens > made]
        flops = len(contexts) * 2 * (shape.body + shape.head) + attention(sum(contexts))
        seconds += max((reading + cached * sum(contexts)) / read, flops / peak)
    tokens = sum(r.max_tokens for r in job.requests)
    return Bound(tokens / seconds, (tokens - len(job.requests)) / (seconds - first) if seconds > first else math.inf)
