"""Prometheus metrics under vLLM's names, so that its dashboards and autoscaler rules work unchanged.

Everything runs on one event loop, so counting is an addition to a list; text is made only when somebody asks. Label
values come from closed sets: no client can create a series.
Source of names and buckets: vLLM's `vllm:*` metrics, documentation "Production metrics".
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ropeway.contract import EngineStats, ExecutorInfo, FinishReason, Ready, Report, Step, TokenEvent, Urgency, Usage

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION_BUCKETS: Final = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
STEP_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HTTP_BUCKETS: Final = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0)
MAX_TOKENS_BUCKET: Final = 2**20

_NOTHING_YET = EngineStats(
    step=0, running=0, waiting=0, slots=0, blocks_total=0, blocks_used=0, blocks_cached=0, rows=0, step_tokens=0,
    step_seconds=0.0, prompt_tokens=0, generation_tokens=0, cache_queries=0, cache_hits=0, preemptions=0,
)  # fmt: skip
"""Before the first step: a series that starts at zero can be used in rates and alerts at once."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.TIMEOUT: "timeout",
    FinishReason.FAILED: "error",
}
_REJECTED = {
    "RW-CTX": "context_length",
    "RW-FIT": "never_fits",
    "RW-BUSY": "queue_full",
    "RW-LOAD": "not_ready",
    "RW-DRAIN": "draining",
    "RW-TIME": "deadline",
    "RW-REQ": "invalid",
    "RW-TPL": "invalid",
    "RW-RATE": "rate_limit",
    "RW-TPM": "rate_limit",
    "RW-BUDGET": "budget",
}


def one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`: vLLM's buckets for lengths."""
    found: list[float] = []
    scale = 1
    while scale <= most:
        found += [float(m * scale) for m in (1, 2, 5) if m * scale <= most]
        scale *= 10
    return tuple(found)


class Histogram:
    """Counts in buckets with inclusive upper bounds; adding costs one binary search."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self._sum += value * times

    def family(self, labels: Sequence[str], values: Sequence[str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.help, labels=labels)
        total, buckets = 0, []
        for bound, count in zip((*(str(b) for b in self.bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(values, buckets, self._sum)
        return family


class Metrics:
    """All metrics of one server. Subscribe `on_report` to the engine's reports; the HTTP floor adds its own.

    A server with several models has one without a `model_name`, and one more for each model, whose `families` it is to
    `include`.
    """

    def __init__(self, model_name: str | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_name = model_name
        self._clock = clock
        self._info: ExecutorInfo | None = None
        self._stats: EngineStats | None = None
        self._last_token: dict[int, float] = {}
        self._finished = dict.fromkeys(_FINISHED.values(), 0)
        self._rejected = {**dict.fromkeys(_REJECTED.values(), 0), "other": 0}
        self._http: dict[tuple[str, str, str], int] = {}
        lengths = one_two_five(MAX_TOKENS_BUCKET)
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Time to first token", TTFT_BUCKETS)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Time between tokens of a request", ITL_BUCKETS)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Time from arrival to the last token", LATENCY_BUCKETS)
        self.queue = Histogram("vllm:request_queue_time_seconds", "Time in the waiting queue", LATENCY_BUCKETS)
        self.prompt = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a finished request", lengths)
        self.generation = Histogram("vllm:request_generation_tokens", "Generated tokens of a finished request", lengths)
        self.iteration = Histogram("vllm:iteration_tokens_total", "Tokens computed by a step", ITERATION_BUCKETS)
        self.step = Histogram("ropeway_step_seconds", "Time that the executor needed for a step", STEP_BUCKETS)
        self.http_seconds = Histogram("http_request_duration_seconds", "Time to answer an HTTP request", HTTP_BUCKETS)
        self._registry = CollectorRegistry()
        self._sources: list[Callable[[], Iterable[Metric]]] = [self.families] if model_name is not None else []
        self._registry.register(_Source(self._all_families))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def on_report(self, report: Report) -> None:
        """Take the news of one step. Cheap: it runs once a step, for all requests together."""
        if isinstance(report, Step):
            self._on_step(report)
        elif isinstance(report, Ready):
            self._info = report.info
            self._last_token.clear()

    def include(self, source: Callable[[], Iterable[Metric]]) -> None:
        """Show also the families that `source` makes. Those of one name are shown as one."""
        self._sources.append(source)

    def rejected(self, code: str) -> None:
        """Count a request that was refused at the door, by the code of its error."""
        self._rejected[_REJECTED.get(code, "other")] += 1

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request. `route` is a route's template or 'other'; `status` 0 means no answer."""
        key = (method if method in _METHODS else "other", route, f"{status // 100}xx" if status else "none")
        self._http[key] = self._http.get(key, 0) + 1
        self.http_seconds.observe(seconds)

    def render(self, stats: EngineStats | None = None) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type. `stats` are newer ones than the last step's, if any."""
        if stats is not None:
            self._stats = stats
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _on_step(self, step: Step) -> None:
        stats, now = step.stats, self._clock()
        if stats.step_tokens and (self._stats is None or self._stats.step != stats.step):
            self.iteration.observe(stats.step_tokens)
            self.step.observe(stats.step_seconds)
        self._stats = stats
        for event in step.events:
            if event.tokens:
                before = self._last_token.get(event.rid)
                if before is not None:
                    self.itl.observe((now - before) / len(event.tokens), len(event.tokens))
                self._last_token[event.rid] = now
            if event.finish is not None:
                self._last_token.pop(event.rid, None)
                self._on_finish(event, event.finish)

    def _on_finish(self, event: TokenEvent, finish: FinishReason) -> None:
        if finish is FinishReason.REJECTED:
            return  # counted where the client is told, together with what never came as far as the engine
        self._finished[_FINISHED[finish]] += 1
        if event.usage is not None:
            self._on_usage(event.usage)

    def _on_usage(self, usage: Usage) -> None:
        self.e2e.observe(usage.total_s)
        self.prompt.observe(usage.prompt_tokens)
        self.generation.observe(usage.completion_tokens)
        if usage.first_scheduled_s is not None:
            self.queue.observe(usage.first_scheduled_s)
        if usage.first_token_s is not None:
            self.ttft.observe(usage.first_token_s)

    def families(self) -> Iterator[Metric]:
        """Those of the model, without HTTP's."""
        labels, values = ("model_name", "engine"), (self.model_name or "", "0")
        yield from _engine_families(self._stats or _NOTHING_YET, labels, values)
        finished = CounterMetricFamily("vllm:request_success", "Finished requests", labels=(*labels, "finished_reason"))
        for reason, count in self._finished.items():
            finished.add_metric((*values, reason), count)
        yield finished
        rejected = CounterMetricFamily(
            "ropeway_requests_rejected", "Requests that were refused before they ran", labels=(*labels, "reason")
        )
        for reason, count in self._rejected.items():
            rejected.add_metric((*values, reason), count)
        yield rejected
        histograms = (
            self.ttft, self.itl, self.e2e, self.queue, self.prompt, self.generation, self.iteration, self.step,
        )  # fmt: skip
        for histogram in histograms:
            yield histogram.family(labels, values)
        if self._info is not None:
            yield _cache_config(self._info, values)

    def _all_families(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for family in chain.from_iterable(source() for source in self._sources):
            first = found.setdefault(family.name, family)
            if first is not family:
                first.samples.extend(family.samples)
        yield from found.values()
        requests = CounterMetricFamily("http_requests", "HTTP requests", labels=("method", "handler", "status"))
        for key, count in self._http.items():
            requests.add_metric(key, count)
        yield requests
        yield self.http_seconds.family((), ())


class _Source(Collector):
    """Hands families to the registry at the moment somebody reads them."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._make = families

    def collect(self) -> Iterable[Metric]:
        return self._make()


def _engine_families(stats: EngineStats, labels: Sequence[str], values: Sequence[str]) -> Iterator[Metric]:
    usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
    occupancy = stats.running / stats.slots if stats.slots else 0.0
    gauges = (
        ("vllm:num_requests_running", "Requests in the running batch", stats.running),
        ("vllm:num_requests_waiting", "Requests waiting for a slot", stats.waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use by requests, 0 to 1", usage),
        ("ropeway_batch_occupancy", "Share of slots that run a request, 0 to 1", occupancy),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        gauge.add_metric(values, value)
        yield gauge
    counters = (
        ("vllm:prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
        ("vllm:generation_tokens", "Generated tokens", stats.generation_tokens),
        ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", stats.cache_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", stats.cache_hits),
        ("vllm:num_preemptions", "Requests put back into the queue", stats.preemptions),
    )
    for name, text, value in counters:
        counter = CounterMetricFamily(name, text, labels=labels)
        counter.add_metric(values, value)
        yield counter
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


def _cache_config(info: ExecutorInfo, values: Sequence[str]) -> Metric:
    config = {
        "block_size": info.block_size, "num_gpu_blocks": info.num_blocks, "cache_dtype": info.dtype,
        "device": info.device, "kv_bytes": info.kv_bytes,
    }  # fmt: skip
    gauge = GaugeMetricFamily(
        "vllm:cache_config_info", "Layout of the KV cache", labels=("model_name", "engine", *config)
    )
    gauge.add_metric((*values, *(str(value) for value in config.values())), 1.0)
    return gauge
