"""What a report of a problem says of a machine, and what it never says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropeway._version import __version__
from ropeway.cli.environment import facts
from ropeway.cli.main import app

SECRET = "hush-hush"


def test_a_report_has_all_sections_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "ROPEWAY_API_KEY": SECRET, "ROPEWAY_REDIS_URL": f"redis://u:{SECRET}@host/0", "ROPEWAY_API_KEYS": SECRET,
        "ROPEWAY_WEBHOOK_URL": f"https://hooks.example/{SECRET}", "ROPEWAY_OTLP_HEADERS": f"x={SECRET}",
        "HF_TOKEN": SECRET, "OPENAI_API_KEY": SECRET, "HTTPS_PROXY": f"http://user:{SECRET}@proxy:3128",
        "ALL_PROXY": f"user:p@{SECRET}@proxy:3128",
        "MY_PASSWORD": SECRET, "ROPEWAY_MAX_NUM_BATCHED_TOKENS": "77", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(Path.home() / "models"),
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = CliRunner().invoke(app, ["collect-env"])
    assert found.exit_code == 0, found.output
    names = [line.split()[0] for line in found.stdout.splitlines() if not line.startswith(" ")]
    assert names == [
        "Ropeway", "Python", "System", "CPU", "Memory", "Compiler", "Kernels", "GPU", "torch", "Packages", "Variables",
    ]  # fmt: skip
    assert SECRET not in found.output
    assert "MY_PASSWORD" not in found.output
    for shown in (
        f" {__version__} at", "ROPEWAY_API_KEY=(hidden)", "ROPEWAY_API_KEYS=(hidden)", "HF_TOKEN=(hidden)",
        "HTTPS_PROXY=http://proxy:3128", "ALL_PROXY=proxy:3128", "ROPEWAY_MAX_NUM_BATCHED_TOKENS=77",
        "OMP_NUM_THREADS=1", "HF_HOME=~/models", "msgspec ", "CUDA ",
    ):  # fmt: skip
        assert shown in found.output


def test_nothing_is_compiled_to_say_how_kernels_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ = {"ROPEWAY_CACHE_DIR": str(tmp_path)}
    told = {value for name, value in facts(environ) if name == "Kernels"}
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    told |= {value for name, value in facts(environ) if name == "Kernels"}
    assert {value.partition(", ")[2] for value in told} <= {
        "not built, can be built at the first start",
        "not built, cannot be built",
    }
    assert any(value.endswith("cannot be built") for value in told)
    assert list(tmp_path.iterdir()) == []
