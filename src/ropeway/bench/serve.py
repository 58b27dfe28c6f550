"""A whole serving benchmark: find the server, warm it up, load it, compute."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.load import LoadRun, arrival_times, run_load
from ropeway.bench.metrics import ServeMetrics, compute
from ropeway.bench.wire import Call, Outcome, measure
from ropeway.errors import ConfigError


@dataclass(frozen=True)
class ServeBench:
    """A finished benchmark. `model` is the name that was sent."""

    run: LoadRun
    metrics: ServeMetrics
    model: str


async def bench_serve(
    config: LoadConfig,
    samples: Sequence[Sample],
    *,
    headers: Mapping[str, str] | None = None,
    goodput: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[Outcome], None] | None = None,
) -> ServeBench:
    """Run one benchmark. Raises ConfigError if the server cannot be reached or every warm-up fails."""
    client = HttpClient(config.url, headers)
    try:
        listed = await _served_model(client, config)
        call = Call(
            backend=config.backend,
            endpoint=config.path,
            model=config.model or listed,
            ignore_eos=config.ignore_eos,
            extra=_extra_body(config.extra_body),
        )
        for i in range(config.num_warmups):
            outcome = await measure(client, call, samples[i % len(samples)])
            if not outcome.ok:
                raise ConfigError(f"The warm-up request failed ({outcome.error}). Look into the server's log.")
        due = arrival_times(len(samples), config.request_rate, config.burstiness, seed)
        run = await run_load(client, call, samples, due, max_concurrency=config.max_concurrency, progress=progress)
    finally:
        client.close()
    metrics = compute(run.outcomes, run.seconds, percentiles=config.percentiles, goodput=goodput)
    return ServeBench(run, metrics, call.model)


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"extra-body is not valid JSON: {error}.", param="extra_body") from None
    if not isinstance(extra, dict):
        raise ConfigError("extra-body must be a JSON object.", param="extra_body")
    return extra


async def _served_model(client: HttpClient, config: LoadConfig) -> str:
    """The first model that the server lists. A server without a list is fine if a model was given."""
    deadline = time.monotonic() + config.ready_check_timeout_sec
    while True:
        try:
            response = await client.request("GET", "/v1/models", within=10.0)
            if response.status == 200:
                return str(msgspec.json.decode(bytes(response.body))["data"][0]["id"])
            problem = f"HTTP {response.status} for /v1/models"
            if config.model and response.status in {404, 405, 501}:
                return config.model
        except (OSError, TimeoutError) as error:
            problem = f"no connection ({error})"
        except (ValueError, KeyError, IndexError, TypeError, msgspec.MsgspecError) as error:
            problem = f"an unexpected answer to /v1/models ({error})"
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"No OpenAI-compatible server at {config.url}: {problem}. Start one with `ropeway serve`, "
                "or give its address with --base-url."
            )
        await asyncio.sleep(0.25)
