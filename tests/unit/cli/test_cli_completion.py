"""What a shell is told while somebody types."""

from __future__ import annotations

import pytest

from ropeway.cli.main import main


def complete(typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash offers for the last word of `typed`."""
    monkeypatch.setenv("_ROPEWAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    with pytest.raises(SystemExit):
        main([])
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ropeway ser", ["serve"]),
        ("ropeway collect", ["collect-env"]),
        ("ropeway bench ", ["serve", "throughput", "batching"]),
        ("ropeway keys cr", ["create"]),
        ("ropeway serve --max-num-s", ["--max-num-seqs"]),
        ("ropeway serve --preset ", ["balanced", "latency", "throughput"]),
        ("ropeway serve --block-size 3", ["32"]),
        ("ropeway serve --scheduling-policy priority:d", ["priority:deadline"]),
        ("ropeway sim --workload azure", ["azure-conv", "azure-code"]),
        ("ropeway quantize bundled out --quantization f", ["fp8"]),
    ],
)
def test_commands_options_and_values_are_completed(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(typed, monkeypatch, capsys) == offered


def test_the_scripts_for_shells_call_this_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_ROPEWAY_COMPLETE", f"source_{shell}")
        with pytest.raises(SystemExit) as end:
            main([])
        assert not end.value.code
        assert f"_ROPEWAY_COMPLETE=complete_{shell}" in capsys.readouterr().out
