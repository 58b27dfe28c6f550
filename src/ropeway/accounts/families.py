"""Metrics of keys. The operator makes keys, so no client can create a series; still there is a bound on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from ropeway.accounts.usage import Amounts

MOST_KEYS: Final = 500
"""Keys that have series of their own; all others are counted together as `other`."""


def families(totals: Mapping[str, Amounts], names: Mapping[str, str]) -> Iterator[Metric]:
    """Of `totals` by key id. What belongs to no key is that of the key `none`."""
    shown: dict[str, Amounts] = {}
    for number, (key, amounts) in enumerate(totals.items()):
        name = names.get(key, key or "none") if number < MOST_KEYS else "other"
        shown.setdefault(name, Amounts()).add(amounts)
    requests = CounterMetricFamily("ropeway_key_requests", "Answers charged to a key", labels=("key",))
    tokens = CounterMetricFamily("ropeway_key_tokens", "Tokens charged to a key", labels=("key", "kind"))
    for name, amounts in shown.items():
        requests.add_metric((name,), amounts.requests)
        tokens.add_metric((name, "prompt"), amounts.prompt - amounts.cached)
        tokens.add_metric((name, "cached"), amounts.cached)
        tokens.add_metric((name, "answer"), amounts.answer)
    yield from (requests, tokens)
