"""Presets, tenants' weights, and that every policy that can be configured exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropeway.cli import server
from ropeway.config import PRESETS, EngineConfig, ServerConfig, check, load, preset_notes, settings, weights_of
from ropeway.engine.engine import policy_order
from ropeway.errors import ConfigError
from ropeway.scheduler import ORDERS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_what_is_not_given(preset: str) -> None:
    config, origins = load(EngineConfig, {"preset": preset}, environ={})
    check(config)
    plain = EngineConfig()
    meaning, chosen = PRESETS[preset]
    for name, (value, why) in chosen.items():
        assert getattr(config, name) == value != getattr(plain, name)
        assert origins[name] == f"preset {preset}"
        assert f"{name}={value}: {why}" in preset_notes(config, origins)
    assert preset_notes(config, origins)[0] == f"preset {preset}: {meaning}"
    values = {
        setting.name: setting.parse(getattr(config, setting.name), "preset") for setting in settings(EngineConfig)
    }
    assert values == vars(config)


def test_start_up_says_what_a_preset_has_set_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "configure", lambda level, shape: None)
    monkeypatch.setattr(server, "_run", lambda main: main.close())
    config, origins = load(EngineConfig, {"preset": "latency", "max_queue": "9"}, environ={})
    with caplog.at_level("INFO"):
        server.run_server(config, ServerConfig(api_key="k", admin_key="hush"), {**origins, "admin_key": "--admin-key"})
    assert "preset latency: few at a time" in caplog.text
    assert "max_num_seqs=8: a step is short when few share it" in caplog.text
    assert "max_queue=9 by --max-queue" in caplog.text
    assert "admin_key=(hidden)" in caplog.text
    assert "hush" not in caplog.text


def test_what_is_given_wins_over_a_preset() -> None:
    environ = {"ROPEWAY_MAX_QUEUE": "7", "ROPEWAY_PRESET": "latency"}
    config, origins = load(EngineConfig, {"max_num_seqs": "64"}, environ=environ)
    assert (config.max_num_seqs, config.max_queue, config.scheduling_policy) == (64, 7, "priority:sjf")
    assert (origins["max_num_seqs"], origins["max_queue"]) == ("--max-num-seqs", "ROPEWAY_MAX_QUEUE")
    notes = " ".join(preset_notes(config, origins))
    assert "scheduling_policy=priority:sjf" in notes
    assert "max_queue" not in notes


def test_balanced_is_the_defaults() -> None:
    config, origins = load(EngineConfig, environ={})
    assert config == EngineConfig(preset="balanced")
    assert not preset_notes(config, origins)


def test_every_policy_that_can_be_chosen_exists_and_the_other_way_round() -> None:
    [policies] = [setting.choices for setting in settings(EngineConfig) if setting.name == "scheduling_policy"]
    assert set(policies) == {*ORDERS, "priority", *(f"priority:{name}" for name in ORDERS if name != "fcfs")}
    for policy in policies:
        assert policy_order(EngineConfig(scheduling_policy=policy)).name == policy  # type: ignore[arg-type]


def test_the_weights_come_from_the_configuration() -> None:
    assert policy_order(EngineConfig(tenant_weights="a=2, b=0.5"), "fair").rules.weights == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize("text", ["a", "a=", "a=x", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,b"])
def test_weights_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=WEIGHT"):
        check(EngineConfig(tenant_weights=text))


def test_names_of_tenants_may_contain_what_keys_contain() -> None:
    assert weights_of("a=b=2") == {"a=b": 2.0}
    assert weights_of(None) == {}


def test_the_documentation_says_what_presets_set() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scheduling.md").read_text(encoding="utf-8")
    for name, (meaning, chosen) in PRESETS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert meaning.rstrip(".") in row
        for value, _ in chosen.values():
            assert (f"`{value}`" if isinstance(value, str) else f"{value:,}" if value else "no limit") in row
