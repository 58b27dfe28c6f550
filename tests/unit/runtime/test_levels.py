"""Which code computes a model on the CPU: as asked for, or as high as it goes, and said at the start."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from native import NATIVE, needs_native, skip_unless_there_is
from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo
from ropeway.errors import ConfigError
from ropeway.runtime import local
from ropeway.runtime.kernels import ops
from ropeway.runtime.layers import linear
from ropeway.runtime.local import LocalExecutor

Make = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("equally_fast")


def _info(directory: Path, **changes: object) -> ExecutorInfo:
    values = {"num_kv_blocks": 8, "max_model_len": 32, "max_num_seqs": 2, "threads": 1} | changes
    executor = LocalExecutor(EngineConfig(model=str(directory), **values))  # type: ignore[arg-type]
    executor.close()
    return executor.info


def _notes(directory: Path, **changes: object) -> dict[str, str]:
    return dict(note.split(": ", 1) for note in _info(directory, **changes).notes if ": " in note)


@pytest.mark.parametrize(
    ("level", "said", "attention", "linears"),
    [
        ("0", "0, plain torch (as told).", "reference", "torch"),
        ("1", "1, packed linear layers (as told).", "reference", "oneDNN"),
        ("2", "2, native kernels called one by one (as told).", "cpu", "native"),
        ("3", "3, each step is one native call (as told).", "cpu", "native"),
        ("auto", "3, each step is one native call (the highest that works here).", "cpu", "native"),
    ],
)
def test_a_level_is_kept_and_said(checkpoint: Make, level: str, said: str, attention: str, linears: str) -> None:
    skip_unless_there_is("3" if level == "auto" else level)
    notes = _notes(checkpoint("llama"), kernel_level=level, dtype="float32")
    assert notes["Kernel level"] == said
    assert notes["Attention"].startswith(attention)
    assert notes["Linear layers"].startswith(linears)


def test_without_kernels_the_highest_level_is_one(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (local, ops, linear):
        monkeypatch.setattr(module, "load", lambda: "there is no compiler")
    notes = _notes(checkpoint("llama"), dtype="float32", attention_backend="reference")
    assert notes["Kernel level"].startswith("1, packed linear layers")
    with pytest.raises(ConfigError, match="kernel_level is 2, but there is no compiler"):
        _notes(checkpoint("llama"), kernel_level="2")


@needs_native
@pytest.mark.parametrize(("onednn", "serves"), [(0.9, "native"), (0.7, "oneDNN")])
def test_only_a_clearly_faster_product_takes_the_place_of_the_preferred_one(
    monkeypatch: pytest.MonkeyPatch, onednn: float, serves: str
) -> None:
    seconds = {linear.NativeProduct: 1.0, linear.OneDnnProduct: onednn, linear.TorchProduct: 2.0}
    monkeypatch.setattr(linear, "_timed", lambda product, x: seconds[type(product)])
    choice = linear.choose("cpu", torch.float32)
    assert choice.name == serves
    assert any("native: 1.4 times slower than oneDNN" in reason for reason in choice.reasons) == (serves == "oneDNN")


@needs_native
def test_a_level_that_the_model_cannot_have_is_refused(checkpoint: Make) -> None:
    with pytest.raises(ConfigError, match="kernel_level is 3, but attention is reference"):
        _notes(checkpoint("llama"), kernel_level="3", attention_backend="reference")
    notes = _notes(checkpoint("llama"), attention_backend="reference")
    assert "not 3: attention is reference" in notes["Kernel level"]


def test_whatever_rounds_otherwise_is_told_apart(checkpoint: Make) -> None:
    ways: list[dict[str, str]] = [
        {"kernel_level": "0"},
        {"kernel_level": "1"},
        {"kernel_level": "0", "quantization": "int8"},
        {"kernel_level": "0", "quantization": "int4"},
        {"kernel_level": "0", "kv_cache_dtype": "fp8"},
        *([{"kernel_level": "2"}] if NATIVE else []),
    ]
    found = [_info(checkpoint("llama"), **way).arithmetic for way in ways]
    assert len(set(found)) == len(ways), found
    assert _info(checkpoint("llama"), **ways[0]).arithmetic == found[0]


def test_kernels_that_do_not_serve_are_not_compiled(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint("llama")
    for module in (local, ops, linear):
        monkeypatch.setattr(module, "load", lambda: pytest.fail("they are"))
    assert _info(directory, kernel_level="0", dtype="float32", attention_backend="reference").arithmetic


def test_layers_that_groups_do_not_fit_are_said_to_be_int8(checkpoint: Make) -> None:
    said = _notes(checkpoint("llama"), quantization="int4")["Quantization"]
    wanted = r"int4 in groups of 64; \d+ of \d+ linear layers int8, since groups of 32 do not divide their 112 inputs,"
    assert re.match(wanted, said), said
