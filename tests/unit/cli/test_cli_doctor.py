"""What doctor finds on machines that are not well."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clikit import program
from typer.testing import CliRunner

from native import NATIVE, needs_native
from ropeway.cli import checks
from ropeway.cli.environment import facts
from ropeway.cli.main import app
from ropeway.errors import ConfigError
from ropeway.runtime.cpu_info import CpuInfo
from ropeway.runtime.kernels import library
from ropeway.runtime.kernels.library import load
from ropeway.runtime.memory import GIB, MemoryState
from ropeway.runtime.roofline import measure
from waiting import until


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_line_is_ok_or_says_what_to_do() -> None:
    found = list(checks.run_checks(0))
    speed = ["Speed"] if not NATIVE else ["Bandwidth", "float32", "bfloat16", "int8"]
    assert [c.name for c in found] == [
        "Python", "torch", "CPU", "Memory", "Compiler", "Kernels", "CUDA", "Disk", "Port", "Proxies", *speed,
    ]  # fmt: skip
    assert all(c.found and (c.ok or c.advice) for c in found)
    result = CliRunner().invoke(app, ["doctor", "--port", "1"])
    assert result.exit_code == 0
    assert result.stdout.count("OK  ") + result.stdout.count("WARN") == len(found)


def test_speed_is_not_measured_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "there is no compiler")
    (check,) = checks.check_speed()
    assert check.name == "Speed"
    assert not check.ok


@needs_native
def test_kernels_stay_below_what_the_machine_can_do() -> None:
    kernels = load()
    assert not isinstance(kernels, str)
    torch.set_num_threads(1)
    # Twice the peak would be a mistake in counting; other work on the machine may spoil one measurement, not all.
    roofline = until(lambda: measure(kernels), lambda found: all(one.many_rows < 2 * one.peak for one in found.reaches))
    assert roofline.threads == 1
    assert roofline.read > 1e8
    for reach in roofline.reaches:
        assert reach.many_rows > 0
        assert reach.one_row > 0


def test_old_python_weak_cpu_taken_port() -> None:
    assert not checks.check_python((3, 10)).ok
    weak = checks.check_cpu(CpuInfo("Old", frozenset({"sse2"}), 1))
    assert (weak.ok, "generic" in weak.found) == (False, True)
    assert "native bfloat16" in checks.check_cpu(CpuInfo("New", frozenset({"avx2", "fma", "amx_bf16"}), 8)).found
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check = checks.check_port(taken.getsockname()[1])
    assert not check.ok
    assert "--port" in check.advice


def test_missing_compiler_and_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("ROPEWAY_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler, kernels = checks.check_compiler(), checks.check_kernels("generic")
    assert not compiler.ok
    assert "g++" in compiler.advice
    assert not kernels.ok


def test_proxy_that_takes_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in checks.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert checks.check_proxies().ok
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy:3128")
    check = checks.check_proxies()
    assert not check.ok
    assert "secret" not in check.found + check.advice
    monkeypatch.setenv("NO_PROXY", "localhost, 127.0.0.1")
    assert checks.check_proxies().ok


def test_a_gpu_is_named_and_whether_torch_can_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no NVIDIA driver" in checks.check_cuda().found
    said = "NVIDIA L4, 23034 MiB, 550.54"
    program(tmp_path, "nvidia-smi", f'[ "$1" = --query-gpu=name,memory.total,driver_version ] && echo "{said}"')
    monkeypatch.setattr(checks, "check_version", lambda: "2.9.1+cu128")
    assert checks.check_cuda() == checks.Check("CUDA", said)
    monkeypatch.setattr(checks, "check_version", lambda: "2.9.1+cpu")
    check = checks.check_cuda()
    assert (check.found, check.ok, "install a CUDA build" in check.advice) == (said, False, True)
    assert dict(facts({}))["GPU"] == said
    program(tmp_path, "nvidia-smi", "exit 9")
    check = checks.check_cuda()
    assert (check.ok, "exit status 9" in check.found, "driver" in check.advice) == (False, True, True)


def test_what_is_not_well_is_counted_and_advised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each line of advice stands below its check."""

    def old() -> str:
        raise ConfigError("torch 1.0 is too old. Upgrade it.")

    monkeypatch.setattr(checks, "check_version", old)
    monkeypatch.setattr(checks, "cpu_memory", lambda: MemoryState(8 * GIB, GIB, "of memory"))
    monkeypatch.setattr(checks, "LITTLE_DISK", 1 << 62)
    monkeypatch.setenv("CXX", str(program(tmp_path, "broken-compiler", "exit 3")))
    monkeypatch.setattr(
        checks, "run_checks", lambda port: iter([checks.check_torch(), checks.check_memory(), checks.check_disk(),
                                                 checks.check_compiler(), checks.check_python()])
    )  # fmt: skip
    lines = CliRunner().invoke(app, ["doctor"]).stdout.splitlines()
    assert [line[:4] for line in lines[:-1]] == ["WARN", "    "] * 4 + ["OK  "]
    assert lines[-1] == "4 things to look at."
    assert [line.strip() for line in lines[1:8:2]] == [
        "torch 1.0 is too old. Upgrade it.",
        "Only small models fit. `ropeway plan MODEL` shows which.",
        "Little room for models: set HF_HOME to a larger disk.",
        "Install g++, or set CXX.",
    ]
    assert "broken-compiler does not run" in lines[6]
