"""Dashboards and alerts ask for series that exist: ours, and those that vLLM's own dashboards ask for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from programs import program
from ropeway.cli import metrics_table
from ropeway.observe.metrics import Metrics

DEPLOY = Path(__file__).parents[3] / "deploy"
_NAMES = """
    vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum vllm:e2e_request_latency_seconds_count
    vllm:prompt_tokens_total vllm:generation_tokens_total vllm:inter_token_latency_seconds_bucket
    vllm:inter_token_latency_seconds_sum vllm:inter_token_latency_seconds_count vllm:num_requests_running
    vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket vllm:time_to_first_token_seconds_sum
    vllm:time_to_first_token_seconds_count vllm:kv_cache_usage_perc vllm:request_prompt_tokens_bucket
    vllm:request_generation_tokens_bucket vllm:request_success_total vllm:request_queue_time_seconds_sum
    vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
    vllm:request_max_num_generation_tokens_sum vllm:request_time_per_output_token_seconds_bucket
    vllm:prefix_cache_hits_total vllm:prefix_cache_queries_total vllm:num_preemptions_total
    vllm:iteration_tokens_total_bucket vllm:request_params_n_bucket vllm:request_params_max_tokens_bucket
    vllm:cache_config_info http_requests_total
"""
OF_VLLM = frozenset(_NAMES.split())
"""What the dashboards in vLLM's and its production stack's repositories ask for of a server without LoRA, speculative
decoding and transfer of KV blocks."""

_NAME = re.compile(r"\b(?:vllm:|ropeway_|http_)[a-z_]+\b")


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all series that a server with a model, a key and jobs shows."""
    found = metrics_table.shown(tmp_path_factory.mktemp("data"))
    return {sample.name for family in found for sample in family.samples}


def made() -> dict[str, Any]:
    found: dict[str, Any] = program("deploy/dashboard.py").dashboard()
    return found


def expressions() -> Iterator[str]:
    for panel in made()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_every_series_that_is_asked_for_exists(series: set[str]) -> None:
    asked = {name for expression in expressions() for name in _NAME.findall(expression)}
    assert len(asked) > 30
    assert asked <= series


def test_dashboards_of_vllm_find_their_series(series: set[str]) -> None:
    assert series >= OF_VLLM


def test_the_dashboard_is_the_one_that_its_program_makes() -> None:
    assert json.loads((DEPLOY / "grafana-dashboard.json").read_text()) == made()


def test_the_documentation_has_the_metrics_that_there_are() -> None:
    page = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    assert page == metrics_table.insert(page), "run `python -m ropeway.cli.metrics_table docs/metrics.md`"


def test_panels_have_a_place_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in made()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(expressions())]
    for rule in rules:  # what Grafana puts in
        rule["expr"] = rule["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for file in (DEPLOY / "alerts.yaml", panels):
        checked = subprocess.run(
            ["promtool", "check", "rules", file], capture_output=True, text=True, timeout=60, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
    text = Metrics("m").render()[0]
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr  # 3: names that are not to promtool's taste
