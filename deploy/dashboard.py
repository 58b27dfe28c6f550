"""Makes Ropeway's Grafana dashboard: `python deploy/dashboard.py > deploy/grafana-dashboard.json`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

MODEL = '{model_name=~"$model"}'
SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """A chart of `queries`, legend and expression each; `about` says what to read from it."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "short"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    panels: list[Panel] = field(default_factory=list)


def rate(counter: str, by: str = "", over: str = "sum") -> str:
    grouped = f" by ({by})" if by else ""
    return f"{over}{grouped} (rate({counter}_total{MODEL}[$__rate_interval]))"


def mean(histogram: str) -> str:
    parts = [f"sum (rate({histogram}_{part}{MODEL}[$__rate_interval]))" for part in ("sum", "count")]
    return " / ".join(parts)


def quantiles(histogram: str) -> dict[str, str]:
    found = f"sum by (le) (rate({histogram}_bucket{MODEL}[$__rate_interval]))"
    return {f"p{share}": f"histogram_quantile(0.{share}, {found})" for share in (50, 90, 99)}


def gauge(name: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} ({name}{MODEL})"


SECTIONS = [
    Section(
        "What people feel",
        [
            Panel(
                "Time to first token",
                "From arrival to the first token, with the time in the queue.",
                quantiles("vllm:time_to_first_token_seconds"),
                "s",
            ),
            Panel(
                "Time between tokens",
                "Gaps inside of answers. Prefill of others stretches them.",
                quantiles("vllm:inter_token_latency_seconds"),
                "s",
            ),
            Panel(
                "Whole answers",
                "From arrival to the last token.",
                quantiles("vllm:e2e_request_latency_seconds"),
                "s",
            ),
        ],
    ),
    Section(
        "The batch",
        [
            Panel(
                "On board and waiting",
                "Running requests cannot be more than there are seats.",
                {"running": gauge("vllm:num_requests_running"), "waiting": gauge("vllm:num_requests_waiting")},
            ),
            Panel(
                "Occupancy",
                "Share of the seats that are taken. Low while others wait: memory is short, not seats.",
                {"seats": f"avg (ropeway_batch_occupancy{MODEL})", "KV": f"avg (vllm:kv_cache_usage_perc{MODEL})"},
                "percentunit",
            ),
            Panel(
                "Tokens a second",
                "Prompt tokens that were computed or found, and generated ones.",
                {"prompt": rate("vllm:prompt_tokens"), "answers": rate("vllm:generation_tokens")},
            ),
            Panel(
                "Waiting, by class",
                "HIGH boards before MEDIUM, MEDIUM before LOW; nobody starves.",
                {"{{urgency}}": gauge("ropeway_requests_waiting", "urgency")},
                stacked=True,
            ),
            Panel(
                "Running, by class",
                "Background classes fill seats that interactive requests leave.",
                {"{{urgency}}": gauge("ropeway_requests_running", "urgency")},
                stacked=True,
            ),
            Panel(
                "Tokens in a step",
                "What one step of the batch carries.",
                quantiles("vllm:iteration_tokens_total"),
            ),
        ],
    ),
    Section(
        "Where the time goes",
        [
            Panel(
                "Parts of a request",
                "Averages: in the queue, reading the prompt, writing the answer.",
                {
                    "queue": mean("vllm:request_queue_time_seconds"),
                    "prefill": mean("vllm:request_prefill_time_seconds"),
                    "decode": mean("vllm:request_decode_time_seconds"),
                },
                "s",
                stacked=True,
            ),
            Panel(
                "Parts of a step",
                "What the executor needs, and what planning and messages add.",
                {"executor": mean("ropeway_step_seconds"), "beside it": mean("ropeway_step_outside_seconds")},
                "s",
                stacked=True,
            ),
            Panel(
                "The engine's thread",
                "Share of the time of each part. A CPU computes the model in submit and chooses tokens in collect.",
                {"{{part}}": rate("ropeway_engine_seconds", "part", "avg")},
                "percentunit",
                stacked=True,
            ),
            Panel(
                "Useful tokens",
                "Of all tokens computed, those that did not have to be computed again after a preemption.",
                {"useful": f"{rate('ropeway_useful_tokens')} / {rate('ropeway_scheduled_tokens')}"},
                "percentunit",
            ),
        ],
    ),
    Section(
        "Memory",
        [
            Panel(
                "Prefix cache",
                "Share of prompt tokens that were found instead of computed.",
                {"hits": f"{rate('vllm:prefix_cache_hits')} / {rate('vllm:prefix_cache_queries')}"},
                "percentunit",
            ),
            Panel(
                "Put back",
                "Requests that had to leave for others, of those that ended. Above 2 %: raise the KV memory.",
                {"put back": f"{rate('vllm:num_preemptions')} / {rate('vllm:request_success')}"},
                "percentunit",
            ),
            Panel(
                "Tiers",
                "Blocks remembered in RAM and on disk, and brought back from there.",
                {
                    "{{tier}} blocks": gauge("ropeway_kv_tier_blocks_used", "tier"),
                    "{{tier}} hits/s": rate("ropeway_kv_tier_hits", "tier"),
                },
            ),
        ],
    ),
    Section(
        "The GPU, where there is one",
        [
            Panel(
                "Utilisation",
                "Share of the time in which the GPU had a kernel to run. Full does not mean that it is used well.",
                {"{{gpu}}": f"max by (gpu) (ropeway_gpu_utilization{MODEL})"},
                "percentunit",
            ),
            Panel(
                "Memory in use",
                "By whomever. Nearly all is taken at the start: the KV cache fills what weights leave.",
                {"{{gpu}}": f"max by (gpu) (ropeway_gpu_memory_used_bytes{MODEL} / ropeway_gpu_memory_bytes{MODEL})"},
                "percentunit",
            ),
            Panel("Power", "What it draws.", {"{{gpu}}": f"max by (gpu) (ropeway_gpu_power_watts{MODEL})"}, "watt"),
        ],
    ),
    Section(
        "Who asks, and what goes wrong",
        [
            Panel(
                "Ends",
                "Requests by how they ended.",
                {"{{finished_reason}}": rate("vllm:request_success", "finished_reason")},
                stacked=True,
            ),
            Panel(
                "Refused",
                "Requests that were refused before they ran, by the reason that the client was told.",
                {"{{reason}}": rate("vllm:admission_rejections", "reason")},
                stacked=True,
            ),
            Panel(
                "HTTP",
                "Answers by status.",
                {"{{status}}": "sum by (status) (rate(http_requests_total[$__rate_interval]))"},
                stacked=True,
            ),
            Panel(
                "Tasks of the server",
                "Of its event loop: some for each open answer and connection. It falls back when they end.",
                {"{{instance}}": "sum by (instance) (ropeway_server_tasks)"},
            ),
            Panel(
                "Tokens, by key",
                "Prompt and answer tokens of the busiest keys.",
                {"{{key}}": "topk(10, sum by (key) (rate(ropeway_key_tokens_total[$__rate_interval])))"},
                stacked=True,
            ),
            Panel(
                "Background work",
                "Items that wait in the job queue, by class.",
                {"{{urgency}}": "sum by (urgency) (ropeway_jobs_waiting)"},
                stacked=True,
            ),
            Panel(
                "Answers a second, by class",
                "Accepted answers.",
                {"{{urgency}}": rate("ropeway_requests", "urgency")},
                stacked=True,
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for section in SECTIONS:
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"type": "row", "title": section.title, "collapsed": False, "gridPos": place, "panels": []})
        top, left = top + 1, 0
        for panel in section.panels:
            if left + panel.width > 24:
                top, left = top + 8, 0
            panels.append(_chart(panel, {"h": 8, "w": panel.width, "x": left, "y": top}))
            left += panel.width
        top += 8
    for number, one in enumerate(panels, 1):
        one["id"] = number
    models = "label_values(vllm:num_requests_running, model_name)"
    return {
        "title": "Ropeway",
        "uid": "ropeway",
        "description": "One Ropeway server, or several: what people feel, the batch, memory, and who asks.",
        "schemaVersion": 39,
        "tags": ["ropeway"],
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "editable": True,
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "label": "Model",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": {"query": models, "refId": "models"},
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _chart(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"lineWidth": 1, "fillOpacity": 25 if panel.stacked else 0, "stacking": stacking, "showPoints": "never"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
