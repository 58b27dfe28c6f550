"""Sweeps and what they recommend."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from simkit import small_config, small_profile

from ropeway.cli.main import main
from ropeway.contract import FinishReason
from ropeway.errors import ConfigError
from ropeway.sim.config import SimConfig
from ropeway.sim.plot import _goodput
from ropeway.sim.profile import load_profile, save_profile, shipped
from ropeway.sim.report import report
from ropeway.sim.simulate import Outcome, Run
from ropeway.sim.sweep import Point, parse_sweeps, recommend, run_sweep
from ropeway.sim.workload import alone


def test_sweeps_are_parsed_as_settings_are() -> None:
    assert parse_sweeps(
        ["scheduling-policy=fcfs,priority", "--max-num-seqs=8,1k", "replicas=1,2", "step_budget_ms=none,20"]
    ) == {
        "scheduling_policy": ["fcfs", "priority"],
        "max_num_seqs": [8, 1000],
        "replicas": [1, 2],
        "step_budget_ms": [None, 20.0],
    }


@pytest.mark.parametrize(
    "item",
    [
        "policy",
        "colour=red",
        "scheduling_policy=",
        "max_num_seqs=many",
        "scheduling_policy=alphabetical",
        "quantization=int8",
        "preset=latency",
    ],
)
def test_a_sweep_that_means_nothing_is_refused(item: str) -> None:
    with pytest.raises(ConfigError):
        parse_sweeps([item])


def test_a_sweep_is_bounded() -> None:
    with pytest.raises(ConfigError, match="400 combinations"):
        parse_sweeps([f"seed={','.join(map(str, range(20)))}", f"replicas={','.join(map(str, range(1, 21)))}"])


def test_a_sweep_runs_every_combination_under_the_same_traffic(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    save_profile(small_profile(), path)
    sim = SimConfig(workload="poisson", num_requests=40, input_len=30, output_len=8, load=0.9, profile=str(path))
    points = run_sweep(sim, small_config(), {"max_num_seqs": [1, 8], "replicas": [1, 2]})
    assert [tuple(p.varied.values()) for p in points] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    assert points[0].rate == points[2].rate
    assert points[1].rate == pytest.approx(2 * points[0].rate, rel=0.2), "a load is a share of all replicas' capacity"
    assert points[0].report.ttft["p50"] > points[2].report.ttft["p50"]


def made(good: int, *, replicas: int, price: float | None = None, wait: float = 0.1) -> Point:
    """A run of ten requests of which `good` met the targets."""
    outcomes = [
        Outcome(alone(0, 1, 1, n), wait if n < good else 99.0, 1.0, 1, finish=FinishReason.LENGTH) for n in range(10)
    ]
    sim = SimConfig(replicas=replicas, price_per_hour=price, attain=0.9)
    found = report(Run(outcomes, seconds=1.0), sim.targets)
    return Point({"replicas": replicas}, small_config(), sim, small_profile(), Run(outcomes), found, 10.0)


def test_the_cheapest_that_is_good_enough_is_recommended() -> None:
    chosen = recommend([made(5, replicas=1), made(10, replicas=4), made(9, replicas=2), made(10, replicas=2)])
    assert chosen.met
    assert chosen.point.sim.replicas == 2
    assert chosen.point.report.goodput == 1.0


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_is_recommended_as_the_server_takes_it(value: bool) -> None:
    point = dataclasses.replace(made(10, replicas=1), varied={"enable_prefix_caching": value})
    flag = "--enable-prefix-caching" if value else "--no-enable-prefix-caching"
    assert f": {flag}, 1 replica." in str(recommend([point]))


def test_price_counts_before_number() -> None:
    chosen = recommend([made(10, replicas=2, price=5.0), made(10, replicas=3, price=3.0)])
    assert chosen.point.sim.replicas == 3
    assert "9.00 an hour" in str(chosen)


def test_if_nothing_is_good_enough_the_best_is_named_and_said_to_be_too_little() -> None:
    chosen = recommend([made(2, replicas=1), made(7, replicas=2), made(7, replicas=4)])
    assert not chosen.met
    assert chosen.point.sim.replicas == 2
    assert "nothing that was tried meets" in str(chosen)


def test_shipped_profiles_say_what_they_are() -> None:
    for name in shipped():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.basis == "measured" or "ESTIMATE" in str(profile)
        assert profile.basis == "estimate" or (profile.fit_error is not None and profile.date)


def test_a_profile_survives_its_file_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    save_profile(small_profile(), path)
    assert load_profile(str(path)) == small_profile()
    path.write_text('{"name": "half"}')
    with pytest.raises(ConfigError, match="no profile"):
        load_profile(str(path))
    with pytest.raises(ConfigError, match="Take one of h200-8b-estimate, laptop-cpu"):
        load_profile(str(tmp_path / "missing.json"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON, picture and recommendation of one small sweep."""
    profile, result, picture = tmp_path / "p.json", tmp_path / "r.json", tmp_path / "p.png"
    save_profile(small_profile(basis="estimate", note="A guess."), profile)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "sim", "--profile", str(profile), "--workload", "poisson", "--num-requests", "20", "--rate", "5",
                "--tenants", "2", "--sweep", "scheduling_policy=fcfs,priority", "--recommend", "--max-num-seqs", "4",
                "--output-json", str(result), "--plot", str(picture), "--price-per-hour", "2",
            ]
        )  # fmt: skip
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "ESTIMATE" in shown
    assert "A guess." in shown
    assert "an hour" in shown
    found = json.loads(result.read_text())
    assert len(found) == 2 * 3 * 4
    assert {"p99_ttft_ms", "goodput", "fairness", "varied"} <= found[0].keys()
    assert picture.stat().st_size > 10_000


def test_goodput_is_drawn_over_the_rates_that_were_tried() -> None:
    """In order of the rate, a curve for each of what else was varied; where the rate was not, a bar for each run."""
    points = [
        dataclasses.replace(made(good, replicas=replicas), varied={"rate": rate, "replicas": replicas}, rate=rate)
        for rate, replicas, good in [(4.0, 1, 5), (1.0, 1, 10), (2.0, 1, 8), (1.0, 2, 10), (4.0, 2, 9)]
    ]
    axes = Figure().subplots()
    _goodput(axes, points)
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn == {"replicas=1": [(1, 100), (2, 80), (4, 50)], "replicas=2": [(1, 100), (4, 90)]}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(drawn)
    assert not axes.patches
    _goodput(bars := Figure().subplots(), [points[1], points[3]])
    assert [bar.get_width() for bar in bars.patches] == [100, 100]
    assert not bars.lines


@pytest.mark.parametrize("words", [
    ["--rate", "1", "--load", "0.5"], ["--trace", "/nowhere.csv"], ["--recommend", "--load", "0.9"],
    ["--trace", "/dev/null", "--tenants", "2"],
])  # fmt: skip
def test_the_command_refuses_what_it_cannot_do(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sim", "--num-requests", "5", *words])
    assert ended.value.code == 2
    assert "RW-CFG" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["latency", "balanced"])
def test_the_command_takes_a_preset(preset: str, tmp_path: Path) -> None:
    """By `latency` no more than thirty-two may wait."""
    profile, result = tmp_path / "p.json", tmp_path / "r.json"
    save_profile(small_profile(), profile)
    words = ["--profile", str(profile), "--num-requests", "60", "--rate", "1e6", "--output-json", str(result)]
    with pytest.raises(SystemExit):
        main(["sim", *words, "--preset", preset])
    [found] = json.loads(result.read_text())
    assert (found["rejected"] > 0) == (preset == "latency")


def test_each_point_is_told_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "p.json"
    save_profile(small_profile(), profile)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        main(["sim", "--profile", str(profile), "--num-requests", "5", "--sweep", "max_num_seqs=2,4"])
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0].strip() for line in said] == ["max_num_seqs=2", "max_num_seqs=4"]
