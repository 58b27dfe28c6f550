"""Every setting is an option, every option a setting, and the documentation says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ropeway.cli import reference
from ropeway.cli.options import show_settings, unknown_variables, with_settings
from ropeway.config import EngineConfig, ServerConfig, load, settings
from ropeway.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
ALL = [s for s in settings(EngineConfig, ServerConfig) if s.name != "model"]


def flags_of(*arguments: str) -> dict[str, Any]:
    """What a command with all settings receives for these arguments."""
    app, got = typer.Typer(), list[dict[str, Any]]()

    @app.command()
    @with_settings(EngineConfig, ServerConfig, without=("model",))
    def command(flags: dict[str, Any]) -> None:
        got.append(flags)

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


def other_value(setting: Any) -> Any:
    """A legal value that is not the default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if setting.kind is bool:
        return not setting.default
    if setting.kind is str:
        return "something"
    value = setting.kind(setting.low or 0)
    return value if value != setting.default else setting.kind(value + 1)


@pytest.mark.parametrize("setting", ALL, ids=lambda s: s.name)
def test_a_flag_reaches_its_setting_and_only_that(setting: Any) -> None:
    value = other_value(setting)
    if setting.kind is bool:
        arguments = [setting.flag if value else "--no-" + setting.flag.removeprefix("--")]
    else:
        arguments = [setting.flag, str(value)]
    flags = flags_of(*arguments)
    assert list(flags) == [setting.name]
    cls = EngineConfig if setting in settings(EngineConfig) else ServerConfig
    config, origins = load(cls, flags, environ={})
    assert getattr(config, setting.name) == value
    given = {name for name, origin in origins.items() if origin != "default" and not origin.startswith("preset")}
    assert given == {setting.name}


def test_nothing_given_is_nothing_set() -> None:
    assert flags_of() == {}


def test_numbers_may_have_suffixes() -> None:
    config, _ = load(EngineConfig, flags_of("--max-model-len", "2K", "--max-num-batched-tokens", "1k"), environ={})
    assert (config.max_model_len, config.max_num_batched_tokens) == (2048, 1000)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max-num-seqs", "infk", "a whole number"),
        ("max-num-seqs", "1e400M", "a whole number"),
        ("max-num-seqs", "[4]", "a whole number"),
        ("max-num-seqs", "4.5", "a whole number"),
        ("max-num-seqs", "true", "a whole number"),
        ("gpu-memory-utilization", "true", "a number"),
        ("gpu-memory-utilization", ".nan", "at least"),
        ("enable-prefix-caching", "perhaps", "true or false"),
        ("revision", "[main]", "a text"),
        ("revision", "{main: 1}", "a text"),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, name: str, value: str, wanted: str) -> None:
    file = tmp_path / "ropeway.yaml"
    file.write_text(f"{name}: {value}\n")
    with pytest.raises(ConfigError, match=f"^{name.replace('-', '_')} in .*; it must be {wanted}"):
        load(EngineConfig, file=file, environ={})


def test_a_file_may_be_empty_and_must_be_readable(tmp_path: Path) -> None:
    file = tmp_path / "ropeway.yaml"
    file.write_text("# max-num-seqs: 4\n")
    assert load(EngineConfig, file=file, environ={}) == load(EngineConfig, environ={})
    file.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8: its byte 10 is 0xe9. Save it as UTF-8"):
        load(EngineConfig, file=file, environ={})
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nests too deeply"):
        load(EngineConfig, file=file, environ={})


def test_help_by_group_and_by_word() -> None:
    groups = show_settings("listgroup", EngineConfig, ServerConfig)
    assert [line.split()[0] for line in groups.splitlines()] == list(dict.fromkeys(s.group for s in ALL))
    memory = show_settings("memory", EngineConfig, ServerConfig)
    assert "--num-kv-blocks <int>" in memory
    assert "ROPEWAY_NUM_KV_BLOCKS" in memory
    assert "--port" not in memory
    assert "--max-queue" in show_settings("--max-queue", EngineConfig, ServerConfig)
    with pytest.raises(ConfigError, match="Scheduling"):
        show_settings("zeppelin", EngineConfig, ServerConfig)


def test_the_documented_settings_are_the_real_ones() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert reference.insert(page) == page, "run: python -m ropeway.cli.reference docs/cli.md"
    assert reference.settings_table() in page


def test_misspelt_variables_are_named() -> None:
    environ = {"ROPEWAY_MAX_NUM_SEQ": "3", "ROPEWAY_PORT": "1", "ROPEWAY_CACHE_DIR": "/x", "PATH": "/bin"}
    assert list(unknown_variables(environ, EngineConfig, ServerConfig)) == [
        "ROPEWAY_MAX_NUM_SEQ is set, but there is no such setting. Did you mean ROPEWAY_MAX_NUM_SEQS?"
    ]
