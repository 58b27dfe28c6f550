"""Redis in the server's metrics. Nobody is asked for them: they are what the last heartbeat has seen."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ropeway.jobs.redis_queue import RedisQueue


def families(queue: RedisQueue) -> Iterator[Metric]:
    """For `Metrics.include`."""
    yield GaugeMetricFamily("ropeway_redis_up", "Whether Redis can be used: 1, or 0 if it is away", float(queue.up))
    tally = queue.tally
    yield GaugeMetricFamily("ropeway_redis_dead_letters", "Dead letters that are kept", tally.dead)
    for name, text, counts in (
        ("ropeway_redis_waiting", "Calls of all servers that no worker has taken", tally.waiting),
        ("ropeway_redis_working", "Calls of all servers that a worker has taken", tally.working),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("urgency",))
        for urgency, count in counts.items():
            gauge.add_metric((urgency.name.lower(),), count)
        yield gauge
    for name, text, count in (
        ("ropeway_redis_losses", "Times that Redis went away", queue.losses),
        ("ropeway_redis_redelivered", "Calls taken over from a worker that was not heard of", tally.redelivered),
        ("ropeway_redis_buried", "Calls that became dead letters", tally.buried),
        ("ropeway_redis_requeued", "Items whose call was lost in Redis", tally.requeued),
        ("ropeway_redis_refused", "Answers that came too late", tally.refused),
    ):
        yield CounterMetricFamily(name, text, count)
