"""Durable work in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ropeway.contract import Urgency
from ropeway.jobs.pace import Pace
from ropeway.jobs.work import Depth
from ropeway.jobs.worker import Worker


def families(depth: Depth | None, worker: Worker | None, pace: Pace) -> Iterator[Metric]:
    """What there is of background work, by class, and how it goes. Without a depth there is none."""
    for name, text, counts in (
        ("ropeway_jobs_waiting", "Requests of jobs that wait for a worker", depth and depth.waiting),
        ("ropeway_jobs_leased", "Requests of jobs that a worker has", depth and depth.leased),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("urgency",))
        for urgency in Urgency:
            gauge.add_metric((urgency.name.lower(),), counts[urgency] if counts else 0)
        yield gauge
    for name, text, count in (
        ("ropeway_jobs_answered", "Answers of jobs that were committed", worker and worker.answered),
        ("ropeway_jobs_retried", "Requests of jobs that were put back to be tried again", worker and worker.retried),
        ("ropeway_jobs_lost", "Requests of jobs that were computed for nothing", worker and worker.lost),
    ):
        yield CounterMetricFamily(name, text, value=float(count or 0))
    yield GaugeMetricFamily("ropeway_jobs_per_second", "Pace of the last minutes of work", value=pace.rate or 0.0)
