"""W4: the servers of the engines under a Poisson load, each asked by the same client over HTTP with streaming."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import machine
from conductor import RUNNERS, EngineError, Plan, last_words, stop
from contenders import Contender
from workloads import Shape, make

from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.load import arrival_times, run_load
from ropeway.bench.metrics import compute
from ropeway.bench.wire import Call

SERVED = "model"
PATIENCE = 600.0
"""Seconds that a server gets to come up: some compile for minutes."""


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(contender: Contender, program: str, model: Path, threads: int, port: int) -> tuple[list[str], str]:
    """How a server is started, and the path that answers 200 once it is ready."""
    path, place = str(model) + contender.form, ["--host", "127.0.0.1", "--port", str(port)]
    named = ["--served-model-name", SERVED, *place]
    if contender.engine == "ropeway":
        flags = [*named, "--threads", str(threads), *_flags(contender.settings)]
        return [program, "-m", "ropeway", "serve", path, *flags], "/readyz"
    if contender.engine == "vllm":
        return [program, str(RUNNERS / "serve_vllm.py"), "serve", path, *named, *_flags(contender.settings)], "/health"
    if contender.engine == "llama.cpp":
        own = ["-t", str(threads), "-tb", str(threads), *contender.settings["flags"]]
        return [program, "-m", path, "-a", SERVED, *place, *own], "/health"
    raise EngineError(f"{contender.engine} has no server with OpenAI's API")


@dataclass(frozen=True)
class OnlineRun:
    """One server under load. Latencies are in ms and count from when a request was due; memory is in MiB."""

    model: str
    contender: str
    round: int
    rate: float
    offered: int
    completed: int
    output: float
    offered_output: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tpot_p50: float
    tpot_p99: float
    lateness_ms: float
    startup: float
    private_mib: int
    others: float
    machine: dict[str, float]
    at: str


@contextmanager
def _server(contender: Contender, words: Sequence[str], log: Path) -> Any:
    with log.open("w") as out:
        environment = {**os.environ, **contender.environment}
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


async def _wait(client: HttpClient, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if (await client.request("GET", path, within=5.0)).status == 200:
                return
        except (OSError, TimeoutError):
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise EngineError(f"no server came up (exit status {process.poll()}):\n{last_words(log)}")
        await asyncio.sleep(0.05)


def samples(vocab: int, count: int, seed: int) -> list[Sample]:
    """W1's requests as often as needed, each time with other tokens. Prompts are token ids, which the servers all
    take, so that every engine computes exactly as many."""
    found: list[Sample] = []
    while len(found) < count:
        for r in make("W1", vocab, seed + 1000 * (1 + len(found) // 64)).requests:
            found.append(Sample(cast(str, r.prompt), len(r.prompt), r.max_tokens))
    return found[:count]


async def load(plan: Plan, name: str, contender: Contender, number: int, rate: float, seconds: float) -> OnlineRun:
    """Start the server, warm it up, load it for `seconds` at `rate` requests/s and wait for every answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    vocab = Shape.read(plan.models / name).vocab
    words, ready = command(contender, plan.programs[contender.engine], plan.models / name, plan.threads, port)
    plan.logs.mkdir(parents=True, exist_ok=True)
    log = plan.logs / f"{name}-{contender.name}-online-{number}.log"
    machine.wait_until_idle(plan.patience)
    begun = time.perf_counter()
    client = HttpClient(f"http://127.0.0.1:{port}")
    call = Call(backend="openai", endpoint="/v1/completions", model=SERVED, ignore_eos=True)
    with _server(contender, words, log) as process:
        await _wait(client, ready, process, log)
        first = await run_load(client, call, samples(vocab, 1, -1 - number), [0.0])
        startup = time.perf_counter() - begun
        warm = await run_load(client, call, samples(vocab, 8, -100 - number), [0.0] * 8)
        failed = [outcome.error for run in (first, warm) for outcome in run.outcomes if not outcome.ok]
        if failed:
            raise EngineError(f"the warm-up failed: {failed[0]}")
        machine.wait_until_idle(plan.patience)
        rates = machine.probe(plan.threads)
        asked = samples(vocab, round(rate * seconds), number)
        due = arrival_times(len(asked), rate, seed=7)
        with machine.watch(process.pid, os.getpid()) as usage:
            run = await run_load(client, call, asked, due)
        client.close()
    found = compute(run.outcomes, run.seconds, percentiles=(50, 99))

    def at(metric: str, percentile: float) -> float:
        return round(found.spreads[metric].percentiles[percentile], 1)

    return OnlineRun(
        model=name,
        contender=contender.name,
        round=number,
        rate=rate,
        offered=len(asked),
        completed=found.completed,
        output=round(found.output_throughput, 1),
        offered_output=round(sum(sample.output_len for sample in asked) / seconds, 1),
        ttft_p50=at("ttft", 50),
        ttft_p99=at("ttft", 99),
        itl_p50=at("itl", 50),
        itl_p99=at("itl", 99),
        tpot_p50=at("tpot", 50),
        tpot_p99=at("tpot", 99),
        lateness_ms=round(1000 * run.lateness, 1),
        startup=round(startup, 2),
        private_mib=usage.private,
        others=usage.others,
        machine=rates,
        at=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
