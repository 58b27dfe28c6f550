"""A step in one native call: the logits and the KV cache of the layered model, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import VOCAB
from native import library_of
from ropeway.errors import KernelError
from ropeway.modelspec import load_spec
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.fused import FusedModel, fuse
from ropeway.runtime.kernels.library import load
from ropeway.runtime.kernels.ops import NativeOps, Ops, TorchOps
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.models.llama import Llama
from ropeway.runtime.models.registry import MODELS
from ropeway.runtime.weights.loader import Weights
from ropeway.runtime.weights.quant import quantize_int4, quantize_int8

from .paged import Line, World, spec_of

Make = Callable[[str], Path]
KINDS = ("llama", "llama-biases", "llama-tied", "mistral-window", "qwen2", "qwen3", "qwen3-window")
FLOATS = (torch.float32, torch.bfloat16)
LONGEST = 128
pytestmark = pytest.mark.usefixtures("equally_fast")


@pytest.fixture(autouse=True)
def _native() -> None:
    library_of()


def model_of(
    directory: Path, dtype: torch.dtype, block_size: int = 8, backend: type[AttentionBackend] = CpuBackend
) -> tuple[Llama, AttentionSpec]:
    """The model over the native kernels, or, over another backend, in plain torch but for its linear layers."""
    spec = load_spec(directory, directory.name)
    attention = spec_of(spec.heads, spec.kv_heads, spec.head_dim, block_size, dtype, spec.windows)
    library = load()
    ops: Ops = NativeOps(library) if backend is CpuBackend and not isinstance(library, str) else TorchOps()
    device = torch.device("cpu")
    with Weights(directory, dtype) as weights:
        return MODELS[spec.architecture](spec, weights, backend(attention, device), ops, device, LONGEST), attention


def fused(model: Llama) -> FusedModel:
    result = fuse(model)
    assert isinstance(result, FusedModel), result
    return result


class Session:
    """Sequences with their tokens, stepped through any number of models, each with a cache of its own."""

    def __init__(self, attention: AttentionSpec, lengths: Sequence[int], seed: int = 0) -> None:
        self.world = World(attention, 64, seed=seed)
        self.lines = [self.world.line(length) for length in lengths]
        draw = torch.Generator().manual_seed(seed)
        self.tokens = {id(line): torch.randint(3, VOCAB, (line.q.shape[0],), generator=draw) for line in self.lines}

    def inputs(self, rows: Sequence[tuple[Line, int]], emit: Sequence[int] | None = None) -> BatchInputs:
        """`emit` are the rows whose logits are wanted, all by default."""
        inputs = self.world.inputs(rows, padding=2)
        tokens = [self.tokens[id(line)][line.computed : line.computed + count] for line, count in rows]
        wanted = inputs.logits_rows if emit is None else inputs.logits_rows[list(emit)]
        return dataclasses.replace(inputs, token_ids=torch.cat(tokens), logits_rows=wanted)

    def store(self, model: Llama) -> Tensor:
        return self.world.store(model.backend)


STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 1),),
    ((0, 30), (1, 3)),
    ((0, 1), (1, 1), (2, 37)),
    ((1, 40), (0, 1), (2, 1), (3, 1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
)
"""Sequence and number of tokens, of each row of each step: one row, decodes beside chunks, decodes alone."""


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=-1e9), b.nan_to_num(nan=-1e9))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_equals_the_layers_bit_for_bit(checkpoint: Make, kind: str, dtype: torch.dtype) -> None:
    """Logits and everything in the cache, over steps of all shapes; and near the reference in plain torch."""
    model, attention = model_of(checkpoint(kind), dtype)
    plain, _ = model_of(checkpoint(kind), dtype, backend=ReferenceBackend)
    whole = fused(model)
    session = Session(attention, (60, 70, 50, 20))
    caches = session.store(model), session.store(model)
    reference = session.store(plain)
    for step in STEPS:
        inputs = session.inputs([(session.lines[s], count) for s, count in step])
        logits = whole.forward(inputs, caches[0])
        assert same(logits, model.forward(inputs, caches[1]))
        assert same(*caches)
        expected = plain.forward(inputs, reference)
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert error < (1e-5 if dtype == torch.float32 else 0.05)
        for s, count in step:
            session.lines[s].computed += count


def quantize(model: Llama, format: str) -> None:
    """Give the model other linear layers, of random integer weights, tied, and wide enough for groups of 32."""
    hidden, wide = model.norm.weight.shape[0], 160
    draw = torch.Generator().manual_seed(5)

    def packed(outs: int, ins: int, lookup: bool = False) -> PackedLinear:
        weight = torch.randn(outs, ins, generator=draw) / ins**0.5
        rounded = quantize_int8(weight) if format == "int8" else quantize_int4(weight, 32)
        return PackedLinear(rounded, None, dtype=model.norm.weight.dtype, lookup=lookup)

    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        attention.qkv = packed(attention.qkv.out_features, hidden)
        attention.out = packed(hidden, attention.out.in_features)
        mlp.gate_up, mlp.down = packed(2 * wide, hidden), packed(hidden, wide)
    model.head = packed(VOCAB, hidden, lookup=True)
    model.embed = model.head.rows


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.inference_mode()
def test_takes_quantized_weights(checkpoint: Make, format: str, dtype: torch.dtype) -> None:
    model, attention = model_of(checkpoint("llama"), dtype)
    quantize(model, format)
    whole = fused(model)
    session = Session(attention, (60, 70, 50, 20))
    caches = session.store(model), session.store(model)
    for step in STEPS:
        inputs = session.inputs([(session.lines[s], count) for s, count in step])
        logits = whole.forward(inputs, caches[0])
        assert same(logits, model.forward(inputs, caches[1]))
        assert same(*caches)
        assert logits.abs().max() > 1
        for s, count in step:
            session.lines[s].computed += count


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("emit", [(), (1,), (2, 0), (0, 1, 2)])
@torch.inference_mode()
def test_computes_only_the_logits_that_are_wanted(checkpoint: Make, emit: tuple[int, ...], block_size: int) -> None:
    """Any rows in any order, or none at all, when the step only fills the cache."""
    model, attention = model_of(checkpoint("qwen3"), torch.bfloat16, block_size)
    session = Session(attention, (21, 40, 9))
    rows = list(zip(session.lines, (21, 40, 9), strict=True))
    caches = session.store(model), session.store(model)
    logits = fused(model).forward(session.inputs(rows, emit), caches[0])
    assert same(logits, model.forward(session.inputs(rows), caches[1])[list(emit)])
    assert same(*caches)


@pytest.mark.parametrize("dtype", FLOATS)
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(checkpoint: Make, dtype: torch.dtype) -> None:
    """Alone or among others, some of them NaN: the same bits. More tokens than pass the feed-forward part at once."""
    model, attention = model_of(checkpoint("llama"), dtype)
    whole = fused(model)
    session = Session(attention, (100, 90, 100, 17, 1), seed=3)
    rows = [(line, line.q.shape[0]) for line in session.lines]
    together = whole.forward(session.inputs(rows), session.store(model))
    for number, row in enumerate(rows):
        alone = whole.forward(session.inputs([row]), session.store(model))
        assert torch.equal(alone[0], together[number])
    assert not together.isnan().any()

    damaged = int(session.tokens[id(session.lines[1])][-1])
    model.embed.weight[damaged] = math.nan
    faulty = {n for n, (line, _) in enumerate(rows) if damaged in session.tokens[id(line)]}
    assert 0 < len(faulty) < len(rows)
    logits = whole.forward(session.inputs(rows), session.store(model))
    for number in range(len(rows)):
        assert same(logits[number], torch.full((VOCAB,), math.nan) if number in faulty else together[number])


@torch.inference_mode()
def test_a_negative_block_is_refused(checkpoint: Make) -> None:
    model, attention = model_of(checkpoint("llama"), torch.float32)
    session = Session(attention, (20,))
    inputs = session.inputs([(session.lines[0], 20)])
    inputs.block_tables[0, 1] = -1
    with pytest.raises(KernelError, match="negative id"):
        fused(model).forward(inputs, session.store(model))


def test_says_why_it_cannot(checkpoint: Make) -> None:
    plain, _ = model_of(checkpoint("llama"), torch.float32, backend=ReferenceBackend)
    assert fuse(plain) == "attention is reference, not the native one"
    model, _ = model_of(checkpoint("llama"), torch.float32)
    model.ops = TorchOps()
    assert fuse(model) == "the small operations are torch, not native"
    assert fuse(object()) == "object does not have the layers of the Llama family"
