"""Weights through pinned buffers into a device: the same tensors, whatever is late and however the files are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lazystreams import LazyStreams
from ropeway import checkpoint
from ropeway.config import EngineConfig
from ropeway.errors import ModelError
from ropeway.modelspec import load_spec
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.models.build import build
from ropeway.runtime.streams import COMPUTE
from ropeway.runtime.weights.loader import Weights
from ropeway.runtime.weights.upload import Uploader

SIZES = {"a": (5, 7), "b": (3, 7), "c": (11, 7), "empty": (0, 7), "bias": (13,)}
STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def stored(path: Path, dtype: torch.dtype) -> Path:
    draw = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SIZES.items()},
        path / "model.safetensors",
    )
    return path


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1 << 30),
    chunk=st.sampled_from([8, 24, 64, 4096]),
    buffers=st.integers(2, 5),
    kind=st.sampled_from(STORED),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_same_as_on_a_cpu(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    chunk: int,
    buffers: int,
    kind: torch.dtype,
    wanted: torch.dtype,
) -> None:
    path = stored(tmp_path_factory.mktemp("weights"), kind)
    streams = LazyStreams(Random(seed))
    uploader = Uploader(streams, chunk=chunk, buffers=buffers, readers=2)
    with Weights(path, wanted) as plain, Weights(path, wanted, uploader=uploader) as direct:
        for names in (["a", "empty", "b", "c"], ["bias"], ["c"]):
            shapes = [SIZES[name] for name in names]
            found = direct.fuse(names, shapes)
            streams.mark(COMPUTE).wait()  # as what the model puts there would
            assert torch.equal(found, plain.fuse(names, shapes)), names
    assert streams.closed


def test_work_waits_for_weights_and_weights_for_work_before(tmp_path: Path) -> None:
    """What was put into COMPUTE before still uses the memory; what comes after finds the weights."""
    info = checkpoint.tensors(stored(tmp_path, torch.float32))["c"]
    for seed in range(20):
        streams = LazyStreams(Random(seed))
        uploader = Uploader(streams, chunk=16, buffers=2, readers=1)
        out, seen = torch.zeros(SIZES["c"]), []
        streams.put(COMPUTE, lambda out=out, seen=seen: seen.append(bool(out.any())))
        uploader.fill([(info, torch.float32, out)])
        streams.put(COMPUTE, lambda out=out, seen=seen: seen.append(bool((out != 0).all())))
        streams.mark(COMPUTE).wait()
        assert seen == [False, True]
        uploader.close()


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = stored(tmp_path, torch.float32)
    with Weights(path, torch.float32, uploader=Uploader(LazyStreams(Random(0)), chunk=16, buffers=4)) as weights:
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(600)
        with pytest.raises(ModelError, match="cannot be read: a file has become shorter"):
            weights.fuse(["a", "b", "c"], [SIZES[name] for name in "abc"])


@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_a_whole_model(checkpoint: Callable[[str], Path], quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as for a device, a model computes what it computes otherwise."""
    spec = load_spec(checkpoint("llama"))
    config = EngineConfig(model=str(spec.directory), quantization=quantization, kernel_level="0")  # type: ignore[arg-type]
    cpu = torch.device("cpu")

    def weights() -> list[torch.Tensor]:
        model = build(spec, config, torch.float32, cpu, TorchOps(), 0, 64).model
        ids = torch.arange(spec.vocab)
        return [model.head(model.embed(ids)), model.layers[-1].mlp.gate_up(model.embed(ids))]  # type: ignore[union-attr]

    expected = weights()
    streams = LazyStreams(Random(0))
    plain = Weights.__init__

    def direct(self: Weights, *args: object, **options: object) -> None:
        plain(self, *args, **{**options, "uploader": Uploader(streams, chunk=256)})  # type: ignore[arg-type]

    monkeypatch.setattr(Weights, "__init__", direct)
    take = Weights.fuse

    def fuse(self: Weights, *args: object) -> torch.Tensor:
        found = take(self, *args)  # type: ignore[arg-type]
        streams.mark(COMPUTE).wait()  # on a device, quantizing is work in COMPUTE and waits by itself
        return found

    monkeypatch.setattr(Weights, "fuse", fuse)
    for found, wanted in zip(weights(), expected, strict=True):
        assert torch.equal(found, wanted)
