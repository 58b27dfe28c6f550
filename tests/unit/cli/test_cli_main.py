"""Errors as one line, exit codes, and what importing the command costs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ropeway.cli.banner import curl_line, program
from ropeway.cli.main import describe, exit_code, main
from ropeway.contract import ExecutorInfo
from ropeway.errors import BY_CODE, ConfigError, EngineError, ModelError

HEAVY = {
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "fastapi", "starlette", "uvicorn",
    "httpx2", "huggingface_hub", "matplotlib", "jinja2", "prometheus_client", "msgspec",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    script = f"import sys\ntry:\n {code}\nexcept SystemExit: pass\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["bench", "serve", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    found = modules_after(f"from ropeway.cli.main import main; main({arguments!r})")
    assert "typer" in found
    assert not found & HEAVY


def test_the_server_process_has_no_torch() -> None:
    found = modules_after("import ropeway.cli.server; ropeway.cli.server._import_http()")
    assert {"fastapi", "uvicorn"} <= found
    assert not found & {"torch", "numpy", "transformers"}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("ROPEWAY_LOG_LEVEL", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "--port", "abc"], "RW-CFG", "--port"),
        (["serve", "--port", "70000"], "RW-CFG", "at most 65535"),
        (["serve", "--dtype", "int3"], "RW-CFG", "float32"),
        (["serve", "--block-size", "24"], "RW-CFG", "one of 8, 16, 32, 64"),
        (["serve", "--host", "0.0.0.0"], "RW-CFG", "--api-key"),
        (["serve", "--config", "/no/such.yaml"], "RW-CFG", "--config"),
        (["plan", "/no/such/model"], "RW-MODEL", "does not exist"),
        (["plan", "--memory-gib", "0.01"], "RW-MEM", "smaller model"),
        (["plan", "--device", "abacus"], "RW-CFG", "H100-80"),
        (["chat", "--url", "http://127.0.0.1:9", "--quick", "hi"], "RW-CFG", "ropeway serve"),
        (["chat", "--url", "nonsense"], "RW-CFG", "--url"),
        (["bench", "serve", "--port", "9"], "RW-CFG", "ropeway serve"),
        (["bench", "serve", "--metric-percentiles", "x"], "RW-CFG", "metric-percentiles"),
        (["bench", "batching", "--lengths", "a"], "RW-CFG", "lengths"),
    ],
)
def test_what_the_operator_got_wrong_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], code: str, words: str
) -> None:
    status, _, err = run(*arguments)
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(f"{code}: ")
    assert words in last
    assert "Traceback" not in err


def test_a_wrong_option_or_command_gets_a_suggestion(run: Run) -> None:
    status, _, err = run("serve", "--max-num-seq", "3")
    assert status == 2
    assert "--max-num-seqs" in err
    status, _, err = run("serv")
    assert status == 2
    assert "'serve'" in err


def test_a_group_without_a_verb_is_helped(run: Run) -> None:
    status, out, err = run("batches")
    assert (status, err) == (2, "")
    assert "create" in out


def test_settings_are_found_by_a_word_in_front_of_any_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help=prefix-caching"])
    assert "--enable-prefix-caching" in capsys.readouterr().out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        main(["serve", "--log-level", "debug", "--port", "abc"])


def test_exit_codes_tell_whose_turn_it_is() -> None:
    assert exit_code(ModelError("x")) == exit_code(ConfigError("x")) == 2
    assert exit_code(EngineError("x")) == 1
    assert all(describe(cls("text")) == f"{code}: text" for code, cls in BY_CODE.items())


def test_configuration_comes_from_flag_then_variable_then_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "ropeway.yaml"
    file.write_text("block-size: 8\nmax-num-batched-tokens: 3\n")
    monkeypatch.setenv("ROPEWAY_MAX_NUM_SEQS", "5")
    _, _, err = run("serve", "--config", str(file))
    assert "max_num_batched_tokens (3) is below max_num_seqs (5)" in err
    _, _, err = run("serve", "--config", str(file), "--max-num-seqs", "4")
    assert "max_num_batched_tokens (3) is below max_num_seqs (4)" in err
    file.write_text("block-sizes: 8\n")
    _, _, err = run("serve", "--config", str(file))
    assert "Did you mean 'block_size'?" in err


def test_the_banner_names_a_command_that_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [".venv/bin/ropeway", "serve"])
    assert program() == ".venv/bin/ropeway"
    (tmp_path / "ropeway").touch(mode=0o755)
    assert program() == "ropeway"
    monkeypatch.setattr("sys.argv", ["/site-packages/ropeway/__main__.py", "serve"])
    assert program() == "ropeway"


def test_the_banner_asks_a_model_without_a_template_to_go_on_and_never_shows_a_key() -> None:
    info = ExecutorInfo(
        model="m", device="cpu", dtype="float32", num_blocks=8, block_size=16, max_slots=1, max_model_len=64,
        vocab_size=256,
    )  # fmt: skip
    words = shlex.split(curl_line("http://127.0.0.1:8000", "m", info, chat=False, key=True).replace("\\\n", ""))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/completions"]
    assert "authorization: Bearer $ROPEWAY_API_KEY" in words
    assert json.loads(words[-1]) == {"model": "m", "stream": True, "prompt": "Once upon a time", "max_tokens": 64}
