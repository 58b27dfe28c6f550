"""What a local executor says of itself, and what it refuses to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, MemoryBudgetError
from ropeway.hub import locate
from ropeway.modelspec import load_spec
from ropeway.runtime import local
from ropeway.runtime import open as opened
from ropeway.runtime.cpu_info import CpuInfo
from ropeway.runtime.local import LocalExecutor, choose_dtype

Make = Callable[[str], Path]


def test_info(checkpoint: Make) -> None:
    directory = checkpoint("llama")
    executor = LocalExecutor(
        EngineConfig(model=str(directory), num_kv_blocks=50, threads=2, max_num_seqs=5, attention_backend="reference")
    )
    info = executor.info
    assert (info.num_blocks, info.block_size, info.max_slots, info.max_model_len) == (50, 16, 5, 256)
    assert (info.device, info.dtype, info.threads, info.vocab_size) == ("cpu", "float32", 2, 300)
    assert info.kv_bytes == 50 * 16 * load_spec(directory).kv_bytes_per_token("float32")
    assert info.weight_bytes == load_spec(directory).parameters * 4
    assert torch.get_num_threads() == 2
    for start in ("Device: CPU", "dtype: float32", "Threads: 2 (as told)", "Attention: reference", "Weights: "):
        assert any(note.startswith(start) for note in info.notes), start
    assert "50 blocks of 16 tokens" in info.notes[-1]
    assert "3.1 requests of the full 256 tokens" in info.notes[-1]
    executor.close()
    executor.close()


def test_the_files_are_looked_up_and_read_once(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def counted(model: str, **where: Any) -> Path:
        looked.append(model)
        return locate(model, **where)

    for module in (local, opened):
        monkeypatch.setattr(module, "locate", counted)
    config = EngineConfig(model=str(checkpoint("llama")), num_kv_blocks=50, threads=1)
    opened.open_executor(config).close()
    assert looked == [config.model]


def test_a_reduced_length_is_the_last_word(checkpoint: Make) -> None:
    info = LocalExecutor(EngineConfig(model=str(checkpoint("llama")), num_kv_blocks=4, threads=1)).info
    assert info.max_model_len == 64
    assert "max-model-len is 64 instead of the model's 256" in info.notes[-1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, ConfigError, "no CUDA device"),
        ({"dtype": "float16"}, ConfigError, "dtype is float16"),
        ({"max_model_len": 257}, ConfigError, "made for 256 tokens"),
        ({"max_model_len": 100, "num_kv_blocks": 6}, MemoryBudgetError, "needs 7 KV blocks .* has 6"),
        ({"num_kv_blocks": 10**9}, MemoryBudgetError, "Use --num-kv-blocks"),
    ],
)
def test_refusals(checkpoint: Make, options: dict[str, Any], error: type[Exception], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    with pytest.raises(error, match=message):
        LocalExecutor(EngineConfig(**{"model": str(checkpoint("llama")), "device": "cpu", **options}))


@pytest.mark.parametrize(
    ("stored", "bf16", "wanted", "expected"),
    [
        ("bfloat16", True, "auto", torch.bfloat16),
        ("bfloat16", False, "auto", torch.float32),
        ("float16", True, "auto", torch.bfloat16),
        ("float16", False, "auto", torch.float32),
        ("float32", True, "auto", torch.float32),
        ("float32", False, "bfloat16", torch.bfloat16),
        ("bfloat16", False, "float32", torch.float32),
    ],
)
def test_dtype_on_a_cpu(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, stored: str, bf16: bool, wanted: Any, expected: torch.dtype
) -> None:
    flags = frozenset({"avx512_bf16"} if bf16 else {"avx2"})
    monkeypatch.setattr(local, "detect", lambda: CpuInfo("", flags, 1))
    monkeypatch.setattr(local, "load", lambda: "there is no compiler")
    changed = dataclasses.replace(load_spec(checkpoint("llama")), dtype=stored)
    found, note = choose_dtype(EngineConfig(dtype=wanted), changed, torch.device("cpu"))
    assert found == expected
    assert str(found).removeprefix("torch.") in note


@pytest.mark.parametrize(("stored", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_native_kernels_read_bfloat16_on_any_cpu(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, stored: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(local, "detect", lambda: CpuInfo("", frozenset({"avx2"}), 1))
    monkeypatch.setattr(local, "load", object)
    spec = dataclasses.replace(load_spec(checkpoint("llama")), dtype=stored)
    assert choose_dtype(EngineConfig(), spec, torch.device("cpu"))[0] == expected


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 5")]
)
def test_an_allocation_that_fails(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As under a limit on the address space, which no budget can foresee."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(local, "KVStore", refuse)
    with pytest.raises(MemoryBudgetError, match=r"allocate memory.* for the KV cache. Lower --kv-cache-gib"):
        LocalExecutor(EngineConfig(model=str(checkpoint("llama")), num_kv_blocks=50, threads=1))


def test_bundled_by_name() -> None:
    executor = LocalExecutor(EngineConfig(num_kv_blocks=200, threads=1))
    assert executor.info.model == "bundled"
