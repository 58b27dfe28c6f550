"""Names that vLLM has given up, for dashboards that still ask for them (`--show-hidden-metrics`).

Source: vLLM's documentation, "Deprecated metrics".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ropeway.contract import EngineStats

if TYPE_CHECKING:
    from ropeway.observe.times import RequestTimes


def hidden(stats: EngineStats, times: RequestTimes, labels: Sequence[str], values: Sequence[str]) -> Iterator[Metric]:
    """The same numbers as under the new names."""
    usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
    hits = stats.cache_hits / stats.cache_queries if stats.cache_queries else 0.0
    for name, value in (("gpu_cache_usage_perc", usage), ("gpu_prefix_cache_hit_rate", hits)):
        gauge = GaugeMetricFamily(f"vllm:{name}", "Hidden: an old name", labels=labels)
        gauge.add_metric(values, value)
        yield gauge
    for name, count in (("queries", stats.cache_queries), ("hits", stats.cache_hits)):
        counter = CounterMetricFamily(f"vllm:gpu_prefix_cache_{name}", "Hidden: an old name", labels=labels)
        counter.add_metric(values, count)
        yield counter
    for name, histogram in (("time_per_output_token", times.itl), ("time_in_queue_requests", times.queue)):
        family: HistogramMetricFamily = histogram.family(labels, values)
        full = f"vllm:{name}" + ("_seconds" if name == "time_per_output_token" else "")
        family.samples = [sample._replace(name=sample.name.replace(family.name, full)) for sample in family.samples]
        family.name = full
        yield family
