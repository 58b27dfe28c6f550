"""The budget before weights: numbers, and a way out when it does not fit."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clikit import program
from rich.console import Console
from typer.testing import CliRunner

from ropeway.cli.budget import DEVICES, devices_that_fit, find_device, resolve_dtype, sequence_lengths, show
from ropeway.cli.main import app
from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, MemoryBudgetError
from ropeway.modelspec import ModelSpec, load_spec


@pytest.fixture
def big(tmp_path: Path) -> ModelSpec:
    """Llama 3.1 8B by its config alone: 8,030,261,248 parameters, 128 KiB of KV per token in bfloat16."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_spec(tmp_path, "big")


def shown(config: EngineConfig, spec: ModelSpec, device: str, memory_gib: float | None = None) -> str:
    console = Console(width=160, highlight=False, record=True, file=io.StringIO())
    show(config, spec, find_device(device, memory_gib), console)
    return console.export_text()


def test_a_known_model_on_a_known_device(big: ModelSpec) -> None:
    text = shown(EngineConfig(max_model_len=8192, max_num_seqs=32), big, "h100-80")
    assert "8,030,261,248 parameters, bfloat16" in text
    assert "128 KiB per token" in text
    rows = {int(r[0].replace(",", "")): [int(x.replace(",", "")) for x in r[1:]] for r in table_rows(text)}
    assert list(rows) == [512, 1024, 2048, 4096, 8192]
    blocks = int(re.search(r"([\d,]+) blocks of 16", text).group(1).replace(",", ""))  # type: ignore[union-attr]
    for length, (needed, fit, run) in rows.items():
        assert needed == length // 16
        assert fit == blocks // needed
        assert run == min(fit, 32)
    # 0.9 of 79.6 GiB, less 15 GiB of weights and a step, at 128 KiB per token.
    assert 54 * 8192 < blocks * 16 < 57 * 8192


def table_rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.fullmatch(r"\s*[\d,]+(\s+[\d,]+){3}\s*", line)]


def test_what_does_not_fit_says_what_would(big: ModelSpec) -> None:
    with pytest.raises(MemoryBudgetError, match=r"14\.96 GiB for its weights.*It fits on RTX4090-24, L4-24, A100-40"):
        shown(EngineConfig(dtype="bfloat16"), big, "cpu", 8.0)
    with pytest.raises(MemoryBudgetError) as refused:
        shown(EngineConfig(max_model_len=131072), big, "L4-24")
    remedy = re.search(r"--max-model-len (\d+)", refused.value.message)
    assert remedy is not None
    # The value that is offered works.
    assert "fit at once" in shown(EngineConfig(max_model_len=int(remedy.group(1))), big, "L4-24")


def test_devices_that_fit_are_those_where_the_plan_succeeds(big: ModelSpec) -> None:
    config = EngineConfig(max_model_len=131072)
    fitting = devices_that_fit(config, big)
    assert fitting == ["A100-40", "A100-80", "H100-80", "H200-141"]
    for name in set(DEVICES) - set(fitting):
        with pytest.raises(MemoryBudgetError):
            shown(config, big, name)


def test_memory_can_be_given(big: ModelSpec) -> None:
    device = find_device("cpu", 3.5)
    assert device.memory.free == device.memory.total == int(3.5 * 1024**3)
    assert resolve_dtype(EngineConfig(dtype="float32"), big, "cpu") == "float32"
    assert resolve_dtype(EngineConfig(), big, "cuda") == "bfloat16"


def test_a_gpu_that_is_not_here(big: ModelSpec) -> None:
    gpu = find_device("cpu", None, 80)
    assert (gpu.kind, gpu.memory.total, gpu.memory.free) == ("cuda", 80 * 1024**3, 80 * 1024**3)
    shared = find_device("cuda", 30, 80)
    assert (shared.memory.total, shared.memory.free) == (80 * 1024**3, 30 * 1024**3)
    with pytest.raises(ConfigError, match="--device L4-24 has a memory of its own"):
        find_device("L4-24", None, 80)
    arguments = ["plan", str(big.directory), "--gpu-memory-gib", "80", "--max-model-len", "8192"]
    text = CliRunner().invoke(app, [*arguments, "--kv-host-gib", "2"], env={"COLUMNS": "200"}).output
    assert "on a GPU with 80 GiB: 80.00 GiB free of 80.00 GiB" in text
    assert "the share 0.9 of 80.00 GiB less weights and workspace" in text
    assert "KV blocks on their way to and from the tiers" in text
    assert "`serve` measures both" in text


def test_this_machines_gpu_is_asked_for_its_memory(
    big: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of several is planned for. What others hold of it still counts in the share that may be taken."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="There is no nvidia-smi"):
        find_device("cuda", None)
    program(
        tmp_path / "bin", "nvidia-smi", 'case "$1" in *memory.total,memory.free) echo "81559, 40000"; esac; echo 1, 1'
    )
    gpu = find_device("cuda", None)
    assert (gpu.kind, gpu.memory.total, gpu.memory.free) == ("cuda", 81559 * 1024**2, 40000 * 1024**2)
    text = CliRunner().invoke(app, ["plan", str(big.directory), "--device", "cuda", "--max-model-len", "4096"]).output
    assert "on this machine's GPU: 39.06 GiB free of 79.65 GiB" in text
    for wrong in ("exit 9", "echo", "echo '[N/A], [N/A]'"):
        program(tmp_path / "bin", "nvidia-smi", wrong)
        with pytest.raises(ConfigError, match="does not say how much memory there is"):
            find_device("cuda", None)


def test_devices_are_listed() -> None:
    lines = CliRunner().invoke(app, ["plan", "--device", "list"]).output.splitlines()
    assert [line.split()[0] for line in lines] == list(DEVICES)
    assert lines[-1].split()[1:] == ["140.4", "GiB"]


def test_a_context_that_is_cut_is_noted(big: ModelSpec) -> None:
    text = shown(EngineConfig(), big, "L4-24")
    cut = re.search(r"Note: max-model-len is (\d+) instead of the model's 131072", text)
    assert cut is not None
    assert int(cut[1]) in (int(row[0].replace(",", "")) for row in table_rows(text))


def test_fp8_is_planned_as_a_gpu_keeps_it(big: ModelSpec) -> None:
    """A CPU widens it, and so does a GPU for another quantization."""
    path = big.directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    spec = load_spec(big.directory, "big")

    def weights(device: str, **settings: Any) -> float:
        found = re.search(
            r"weights +([\d.]+) GiB", shown(EngineConfig(max_model_len=512, **settings), spec, device, 40)
        )
        assert found is not None
        return float(found[1])

    gpu, cpu = weights("H100-80"), weights("cpu", dtype="bfloat16")
    assert cpu == pytest.approx(14.96, abs=0.01)
    assert gpu < 0.65 * cpu


def test_lengths_double_up_to_the_limit() -> None:
    assert sequence_lengths(2048) == [512, 1024, 2048]
    assert sequence_lengths(3000) == [512, 1024, 2048, 3000]
    assert sequence_lengths(100) == [100]


def test_planning_needs_no_torch(big: ModelSpec) -> None:
    code = (
        "import sys; from ropeway.cli.main import main\n"
        f"try: main(['plan', {str(big.directory)!r}, '--device', 'H100-80'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fit at once" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_smaller_type_in_the_cache_is_planned_as_it_is_served() -> None:
    def each(*words: str) -> float:
        shown = CliRunner().invoke(app, ["plan", *words]).output
        found = re.search(r"([\d.]+) KiB per token", shown)
        assert found is not None, shown
        return float(found[1])

    assert each("--kv-cache-dtype", "int8") < 0.6 * each()
