"""What the engine says of itself, as Prometheus families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ropeway.contract import EngineStats, ExecutorInfo, Urgency
from ropeway.observe.gpu import Gpus


def engine_families(stats: EngineStats, labels: Sequence[str], values: Sequence[str]) -> Iterator[Metric]:
    usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
    occupancy = stats.running / stats.slots if stats.slots else 0.0
    computed = stats.prompt_tokens - stats.cache_hits
    useful = computed + stats.generation_tokens
    gauges = (
        ("vllm:num_requests_running", "Requests in the running batch", stats.running),
        ("vllm:num_requests_waiting", "Requests waiting for a slot", stats.waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use by requests, 0 to 1", usage),
        ("ropeway_kv_blocks_cached", "KV blocks that nobody uses and that still hold a prefix", stats.blocks_cached),
        ("ropeway_batch_occupancy", "Share of slots that run a request, 0 to 1", occupancy),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        gauge.add_metric(values, value)
        yield gauge
    counters = (
        ("vllm:prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
        ("vllm:prompt_tokens_cached", "Prompt tokens of admitted requests that a cache had", stats.cache_hits),
        ("vllm:generation_tokens", "Generated tokens", stats.generation_tokens),
        ("ropeway_useful_tokens", "Tokens of prompts without what was cached, and of answers", useful),
        ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", stats.cache_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", stats.cache_hits),
        ("vllm:num_preemptions", "Requests put back into the queue", stats.preemptions),
    )
    for name, text, value in counters:
        counter = CounterMetricFamily(name, text, labels=labels)
        counter.add_metric(values, value)
        yield counter
    by_source = CounterMetricFamily(
        "vllm:prompt_tokens_by_source", "Prompt tokens of admitted requests, by where they came from",
        labels=(*labels, "source"),
    )  # fmt: skip
    by_source.add_metric((*values, "local_compute"), computed)
    by_source.add_metric((*values, "local_cache_hit"), stats.cache_hits)
    by_reason = GaugeMetricFamily(
        "vllm:num_requests_waiting_by_reason", "Requests waiting for a slot, by why", labels=(*labels, "reason")
    )
    by_reason.add_metric((*values, "capacity"), stats.waiting)
    yield from (by_source, by_reason)
    by_urgency = (*labels, "urgency")
    running = GaugeMetricFamily("ropeway_requests_running", "Requests in the running batch", labels=by_urgency)
    waiting = GaugeMetricFamily("ropeway_requests_waiting", "Requests waiting for a slot", labels=by_urgency)
    all_high = [(stats.running, stats.waiting), (0, 0), (0, 0)]
    for urgency, (runs, waits) in zip(Urgency, stats.urgencies or all_high, strict=True):
        running.add_metric((*values, urgency.name.lower()), runs)
        waiting.add_metric((*values, urgency.name.lower()), waits)
    yield from (running, waiting)
    labels, of_tier = (*labels, "tier"), [((*values, tier.name), tier) for tier in stats.tiers]
    blocks = GaugeMetricFamily("ropeway_kv_tier_blocks", "KV blocks that a tier has room for", labels=labels)
    used = GaugeMetricFamily("ropeway_kv_tier_blocks_used", "KV blocks that a tier remembers", labels=labels)
    hits = CounterMetricFamily("ropeway_kv_tier_hits", "KV blocks brought back from a tier", labels=labels)
    for names, tier in of_tier:
        blocks.add_metric(names, tier.blocks)
        used.add_metric(names, tier.used)
        hits.add_metric(names, tier.hits)
    yield from (blocks, used, hits)


def cache_config(info: ExecutorInfo, values: Sequence[str]) -> Metric:
    config = {
        "block_size": info.block_size, "num_gpu_blocks": info.num_blocks, "cache_dtype": info.dtype,
        "device": info.device, "kv_bytes": info.kv_bytes,
    }  # fmt: skip
    gauge = GaugeMetricFamily(
        "vllm:cache_config_info", "Layout of the KV cache", labels=("model_name", "engine", *config)
    )
    gauge.add_metric((*values, *(str(value) for value in config.values())), 1.0)
    return gauge


def gpu_families(info: ExecutorInfo, gpus: Gpus, labels: Sequence[str], values: Sequence[str]) -> Iterator[Metric]:
    """The engine's GPU, as far as its driver tells. Nothing without one: 0 would look like an idle one."""
    found = gpus.read(info.device_id) if info.device_id else None
    if found is None:
        return
    gauges = (
        ("utilization", "Share of the last moments in which the GPU had a kernel to run, 0 to 1", found.utilization),
        ("memory_bytes", "Memory of the GPU", found.memory_bytes),
        ("memory_used_bytes", "Memory of the GPU that is in use, by whomever", found.memory_used_bytes),
        ("power_watts", "Power that the GPU draws", found.power_watts),
    )
    for name, text, value in gauges:
        if value is not None:
            gauge = GaugeMetricFamily(f"ropeway_gpu_{name}", text, labels=(*labels, "gpu"))
            gauge.add_metric((*values, info.device_id), value)
            yield gauge
