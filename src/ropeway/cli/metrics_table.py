"""`python -m ropeway.cli.metrics_table docs/metrics.md`: write the table of metrics into the documentation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client.core import Metric

from ropeway.accounts import Accounts
from ropeway.accounts.families import families as of_keys
from ropeway.accounts.usage import Amounts
from ropeway.config import ServerConfig
from ropeway.contract import EngineStats, ExecutorInfo, Ready, Step, TierStats
from ropeway.jobs.running import Jobs
from ropeway.observe.gpu import Reading
from ropeway.observe.metrics import Metrics

BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"
_ALWAYS = ("model_name", "engine")


class _Gpu:
    """One that says everything."""

    def read(self, uuid: str) -> Reading:
        return Reading(0.5, 2, 1, 100.0)


def shown(folder: Path) -> list[Metric]:
    """The families of a server with a model on a GPU, all that can be asked for, tiers, a key and jobs in `folder`."""
    info = ExecutorInfo(
        model="m", device="cuda", dtype="float32", num_blocks=9, block_size=16, max_slots=8, max_model_len=64,
        vocab_size=9, device_id="GPU-1",
    )  # fmt: skip
    stats = EngineStats(
        step=1, running=1, waiting=0, slots=8, blocks_total=9, blocks_used=1, blocks_cached=0, rows=1, step_tokens=3,
        step_seconds=0.1, prompt_tokens=3, generation_tokens=0, cache_queries=3, cache_hits=0, preemptions=0,
        tiers=[TierStats("host", 5, 1, 1)],
    )  # fmt: skip
    metrics = Metrics("m", blocks=True, gpus=_Gpu())
    metrics.on_report(Ready(info))
    metrics.on_report(Step([], stats))
    metrics.http_request("GET", "/metrics", 200, 0.1)
    metrics.include(
        Jobs(ServerConfig(data_dir=str(folder)), Accounts(folder), longest=1000, serves=lambda name: True).families
    )
    metrics.include(lambda: of_keys({"k": Amounts(requests=1, prompt=1)}, {"k": "app"}))
    return list(metrics.all_families())


def table() -> str:
    """All metrics in Markdown, vLLM's names first."""
    with TemporaryDirectory() as folder:
        found = shown(Path(folder))
    lines = ["| metric | kind | by | meaning |", "|---|---|---|---|"]
    lines += _rows(one for one in found if one.name.startswith("vllm:"))
    lines += _rows(one for one in found if not one.name.startswith("vllm:"))
    return "\n".join(lines) + "\n"


def _rows(found: Iterator[Metric]) -> list[str]:
    rows = []
    for one in sorted(found, key=lambda one: one.name):
        labels = dict.fromkeys(name for sample in one.samples for name in sample.labels)
        by = ", ".join(f"`{name}`" for name in labels if name not in (*_ALWAYS, "le"))
        suffix = "_total" if one.type == "counter" else ""
        rows.append(f"| `{one.name}{suffix}` | {one.type} | {by} | {one.documentation} |")
    return rows


def insert(page: str) -> str:
    """`page` with the table between its markers replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}{END}{tail}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text()))
