"""Metrics of deployments and routes. Label values come from the table, so no client can create a series."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ropeway.gateway.choice import Way
from ropeway.gateway.deployment import Deployment


def families(deployments: Iterable[Deployment], ways: Iterable[Way]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "ropeway_deployment_requests",
        "Requests sent to a deployment, by what became of them",
        labels=("deployment", "outcome"),
    )
    flight = GaugeMetricFamily("ropeway_deployment_in_flight", "Requests that it is answering", labels=("deployment",))
    up = GaugeMetricFamily("ropeway_deployment_up", "Whether requests may go there", labels=("deployment",))
    retries = CounterMetricFamily(
        "ropeway_route_retries", "Requests that were tried at another deployment", labels=("route",)
    )
    yield from (requests, flight, up, retries)
    for one in deployments:
        for outcome, number in one.counts.items():
            requests.add_metric((one.name, outcome), number)
        flight.add_metric((one.name,), one.load)
        up.add_metric((one.name,), not one.blocked)
        for histogram in (one.ttft, one.latency):
            yield histogram.family(("deployment",), (one.name,))
    for way in ways:
        retries.add_metric((way.route.name,), way.retries)
