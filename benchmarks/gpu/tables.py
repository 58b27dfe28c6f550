"""From what was measured to tables that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of a run, with where and how it was taken."""
    about = found["surroundings"]
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items() if number)
    parts = [f"# {about.get('gpu') or about['processor']}, {about['at']}"]
    if found.get("tiny"):
        parts.append("Tiny shapes, to test the program: no figure here means anything.")
    device = f"{about['gpu']}, {about['memory_gib']} GiB, driver {about['driver']}, " if "gpu" in about else ""
    parts.append(f"Commit {about['commit']}; {device}{packages}, Python {about['python']}.")
    for name, (title, columns) in PARTS_SHOWN.items():
        rows, status = found["rows"].get(name, []), found["status"].get(name, "not asked for")
        if not rows and status == "not asked for":
            continue
        parts.append(f"## {title}")
        parts += [table(rows, columns)] if rows else []
        parts += [f"*{status}*"] if status != "done" else []
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["took"].items())
    parts.append(f"In all {found['seconds']:.0f} s of {found['budget']:.0f}: {took}.")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """`columns` are (key, heading, format); columns without any value are left out, and so are rows without any."""
    used = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = ["| " + " | ".join(heading for _, heading, _ in used) + " |", "|" + " --- |" * len(used)]
    for row in rows:
        cells = [_cell(row.get(key), form) for key, _, form in used]
        if any(cells):
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if form == "list":
        return "<br>".join(map(str, value))
    return format(value, form).replace("|", "/")


_WHO = [("who", "", "s"), ("weights", "weights", "s"), ("cache", "KV cache", "s")]
_DECODE = [
    *_WHO, ("rows", "rows", "d"), ("context", "context", "d"), ("ms", "ms a step", ".3f"),
    ("tokens_s", "tokens/s", ",.0f"), ("device_ms", "of it on the device", ".3f"), ("idle", "device idle", ".2%"),
    ("of_read", "of read bandwidth", ".1%"),
    ("floor_ms", "library's products + KV at read speed, ms", ".3f"),
]  # fmt: skip
_OFFLINE = [
    *_WHO, ("requests", "requests", "d"), ("output_tokens", "output tokens", ",d"), ("seconds", "s", ".1f"),
    ("output_s", "output tokens/s", ",.0f"), ("requests_s", "requests/s", ".1f"), ("rows", "rows a step", ".1f"),
    ("step_ms", "ms a step", ".2f"), ("busy", "device busy", ".1%"), ("preemptions", "preemptions", "d"),
]  # fmt: skip

PARTS_SHOWN: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "ceilings": ("What the device can do", [
        ("what", "bandwidth", "s"), ("type", "type", "s"), ("product", "product", "s"), ("rows", "rows", "d"),
        ("us", "us", ".1f"), ("tflop_s", "TFLOP/s", ".1f"), ("gb_s", "GB/s", ",.0f"), ("lacks", "not measured", "s"),
    ]),
    "start": ("Start", [
        ("start_s", "weights, profile and warm-up, s", ".1f"), ("graphs", "graphs", "d"),
        ("capture_s", "captured in s", ".1f"), ("blocks", "KV blocks", ",d"), ("depth", "depth", "d"),
        ("attention", "attention", "s"), ("notes", "notes", "list"),
    ]),
    "decode": ("Decode", _DECODE),
    "prefill": ("Prefill", [
        ("length", "prompt", ",d"), ("prompts", "prompts", "d"), ("steps", "steps", "d"), ("seconds", "s", ".2f"),
        ("tokens_s", "tokens/s", ",.0f"), ("of_gemm", "of the best product's FLOP/s", ".1%"),
    ]),
    "offline": ("Mixed requests, all at once", _OFFLINE),
    "continuous": ("The same, by transformers' continuous batching", [*_OFFLINE, ("start_seconds", "start, s", ".1f")]),
    "static": ("The same, by transformers in static batches", _OFFLINE),
    "online": ("Mixed requests, arriving at random", [
        ("share", "of the offline rate", ".0%"), ("rate", "requests/s", ".1f"), ("requests", "requests", "d"),
        ("output_s", "output tokens/s", ",.0f"), ("ttft_p50_ms", "TTFT p50, ms", ".0f"), ("ttft_p99_ms", "p99", ".0f"),
        ("itl_p50_ms", "gap p50, ms", ".1f"), ("itl_p99_ms", "p99", ".1f"), ("lacks", "not measured", "s"),
    ]),
    "yardstick": ("nano-vllm's benchmark", _OFFLINE),
    "trace": ("Decode steps, traced", [
        ("rows", "rows", "d"), ("idle_between", "idle between steps", ".2%"), ("idle_within", "idle within", ".2%"),
        ("gap_us", "gap, us", ".0f"), ("longest_gap_us", "longest", ".0f"), ("kernel", "kernel", "s"),
        ("calls", "calls a step", ".1f"), ("us", "us a step", ".1f"), ("share", "share", ".1%"),
        ("gb_s", "GB/s", ",.0f"), ("lacks", "not measured", "s"),
    ]),
    "peers-decode": ("Decode, by others", _DECODE),
    "fp8": ("Decode with fp8 weights", _DECODE),
    "int8": ("Decode with int8 weights", _DECODE),
    "int4": ("Decode with int4 weights", _DECODE),
    "fp8-cache": ("Decode with an fp8 KV cache", _DECODE),
    "tiers": ("Blocks between the device and pinned memory", [
        ("from", "from", "s"), ("to", "to", "s"), ("blocks", "blocks", "d"), ("block_mb", "MB each", ".2f"),
        ("gb_s", "GB/s", ".1f"), ("us_per_token", "us a token", ".2f"),
    ]),
}  # fmt: skip
"""By part: its title, and (key, heading, format) of what is shown of its rows, in the order for readers."""
