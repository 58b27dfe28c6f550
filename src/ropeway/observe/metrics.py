"""Prometheus metrics under vLLM's names, so that its dashboards and autoscaler rules work unchanged.

Everything runs on one event loop, so counting is an addition to a list; text is made only when somebody asks. Label
values come from closed sets: no client can create a series.
Source of names and buckets: vLLM's `vllm:*` metrics, documentation "Production metrics".
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ropeway.contract import EngineStats, ExecutorInfo, FinishReason, Ready, Report, Step, TokenEvent, Urgency
from ropeway.contract.scene import PARTS, Noted
from ropeway.errors import NumericalError
from ropeway.observe.families import cache_config, engine_families, gpu_families
from ropeway.observe.gpu import Gpus, Nvml
from ropeway.observe.hidden import hidden
from ropeway.observe.histogram import HTTP_BUCKETS, ITERATION_BUCKETS, STEP_BUCKETS, Histogram
from ropeway.observe.times import BlockTimes, RequestTimes

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


class Metrics:
    """All metrics of one server. Subscribe `on_report` to the engine's reports; the HTTP floor adds its own.

    A server with several models has one without a `model_name`, and one more for each model, whose `families` it is to
    `include`. `hidden_names` shows the names that vLLM has given up as well, `blocks` the lives of KV blocks. `gpus` is
    asked about the engine's GPU, if it has one.
    """

    def __init__(
        self,
        model_name: str | None,
        *,
        hidden_names: bool = False,
        blocks: bool = False,
        clock: Callable[[], float] = time.monotonic,
        gpus: Gpus | None = None,
    ) -> None:
        self.model_name = model_name
        self.times = RequestTimes()
        self.blocks = BlockTimes() if blocks else None
        self._hidden = hidden_names
        self._gpus = gpus or Nvml()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._clock = clock
        self._info: ExecutorInfo | None = None
        self._stats: EngineStats | None = None
        self._last_token: dict[int, float] = {}
        self._finished = dict.fromkeys(_FINISHED.values(), 0)
        self._rejected = {**dict.fromkeys(_REJECTED.values(), 0), "other": 0}
        self._answers: Counter[Urgency] = Counter()
        self._written: Counter[Urgency] = Counter()
        self._http: dict[tuple[str, str, str], int] = {}
        self._corrupted = self._scheduled = 0
        self._told: float | None = None  # when the last step that others followed was told of
        self.iteration = Histogram("vllm:iteration_tokens_total", "Tokens computed by a step", ITERATION_BUCKETS)
        self.step = Histogram("ropeway_step_seconds", "Time that the executor needed for a step", STEP_BUCKETS)
        self.between = Histogram(
            "ropeway_step_outside_seconds",
            "Time between the news of two steps that the executor did not need: planning, messages, waiting",
            STEP_BUCKETS,
        )
        self.http_seconds = Histogram("http_request_duration_seconds", "Time to answer an HTTP request", HTTP_BUCKETS)
        self._registry = CollectorRegistry()
        self._sources: list[Callable[[], Iterable[Metric]]] = [self.families] if model_name is not None else []
        self._registry.register(_Source(self.all_families))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def on_report(self, report: Report) -> None:
        """Take the news of one step. Cheap: it runs once a step, for all requests together."""
        if isinstance(report, Step):
            self._on_step(report)
        elif isinstance(report, Noted):
            for part, seconds in zip(PARTS, report.seconds, strict=True):
                self._spent[part] += seconds
            if self.blocks is not None:
                self.blocks.ended(report.blocks)
        elif isinstance(report, Ready):
            self._info = report.info
            self._last_token.clear()

    def include(self, source: Callable[[], Iterable[Metric]]) -> None:
        """Show also the families that `source` makes. Those of one name are shown as one."""
        self._sources.append(source)

    def rejected(self, code: str) -> None:
        """Count a request that was refused at the door, by the code of its error."""
        self._rejected[_REJECTED.get(code, "other")] += 1

    def asked(self, urgency: Urgency, n: int, max_tokens: int | None) -> None:
        """Count an answer of `n` sequences that has been accepted."""
        self._answers[urgency] += 1
        self.times.choices.observe(n)
        if max_tokens is not None:
            self.times.limit.observe(max_tokens)

    def answered(self, urgency: Urgency, tokens: int, longest: int) -> None:
        """Count the tokens of an answer that has ended, however it ended, and those of its longest sequence."""
        self._written[urgency] += tokens
        self.times.most.observe(longest)

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
            self._scheduled += stats.step_tokens
            self.iteration.observe(stats.step_tokens)
            self.step.observe(stats.step_seconds)
            if self._told is not None:
                self.between.observe(max(0.0, now - self._told - stats.step_seconds))
            self._told = now if stats.running else None
        self._stats = stats
        for event in step.events:
            if event.tokens:
                before = self._last_token.get(event.rid)
                if before is not None:
                    self.times.itl.observe((now - before) / len(event.tokens), len(event.tokens))
                self._last_token[event.rid] = now
            if event.finish is not None:
                self._last_token.pop(event.rid, None)
                self._on_finish(event, event.finish)

    def _on_finish(self, event: TokenEvent, finish: FinishReason) -> None:
        if finish is FinishReason.REJECTED:
            return  # counted where the client is told, together with what never came as far as the engine
        self._finished[_FINISHED[finish]] += 1
        self._corrupted += event.error is not None and event.error.code == NumericalError.code
        if event.usage is not None:
            self.times.ended(event.usage)

    def families(self) -> Iterator[Metric]:
        """Those of the model, without HTTP's."""
        labels, values = ("model_name", "engine"), (self.model_name or "", "0")
        stats = self._stats or _NOTHING_YET

        def counter(name: str, text: str, by: str, counts: Iterable[tuple[str, float]]) -> CounterMetricFamily:
            family = CounterMetricFamily(name, text, labels=(*labels, by) if by else labels)
            for value, count in counts:
                family.add_metric((*values, value) if by else values, count)
            return family

        yield from engine_families(stats, labels, values)
        yield counter("vllm:request_success", "Finished requests", "finished_reason", self._finished.items())
        refused = "Requests that were refused before they ran"
        yield counter("vllm:admission_rejections", refused, "reason", self._rejected.items())
        text = "Requests that ended because their logits were not finite"
        yield counter("vllm:corrupted_requests", text, "", [("", self._corrupted)])
        text = "Tokens that steps have computed, also those computed again after a preemption, or in vain"
        yield counter("ropeway_scheduled_tokens", text, "", [("", self._scheduled)])
        answers = [(urgency.name.lower(), self._answers[urgency]) for urgency in Urgency]
        yield counter("ropeway_requests", "Answers that have been accepted", "urgency", answers)
        written = [(urgency.name.lower(), self._written[urgency]) for urgency in Urgency]
        yield counter("ropeway_answered_tokens", "Generated tokens of answers that have ended", "urgency", written)
        text = "Time of the engine's thread while there was work, by what it went to"
        yield counter("ropeway_engine_seconds", text, "part", self._spent.items())
        blocks = () if self.blocks is None else vars(self.blocks).values()
        for histogram in (*vars(self.times).values(), *blocks, self.iteration, self.step, self.between):
            yield histogram.family(labels, values)
        if self._info is not None:
            yield cache_config(self._info, values)
            yield from gpu_families(self._info, self._gpus, labels, values)
        if self._hidden:
            yield from hidden(stats, self.times, labels, values)

    def all_families(self) -> Iterator[Metric]:
        """All of this server's own; those of one name as one."""
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
        yield GaugeMetricFamily("ropeway_server_tasks", "Tasks of the server's event loop", value=_tasks())


def _tasks() -> int:
    """Of the loop that asks; 0 where none runs."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


class _Source(Collector):
    """Hands families to the registry at the moment somebody reads them."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._make = families

    def collect(self) -> Iterable[Metric]:
        return self._make()
