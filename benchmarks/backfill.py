"""What background work costs the people who wait, and what it yields: the same chats alone, and beside a backlog.

    python benchmarks/backfill.py --profile laptop-cpu            # in virtual time: the real scheduler, estimated steps
    python benchmarks/backfill.py --profile h200-8b-estimate --length-scale 1 --seats 256 --gaps default,0,10,20
    python benchmarks/backfill.py bundled --loads 0.4 --rounds 3  # a real server, streams over HTTP

Chats have the lengths of a published trace and come as a Poisson process, at shares of what the server can do at most.
The backlog consists of requests of the same kind with urgency LOW, and never ends. Compared are the 99th percentiles of
the time to the first token and of the gap between tokens, and all tokens that are computed in a second with those of an
offline run of the same requests. The aim: at most 1.10 times the former, at least 0.90 of the latter.

In virtual time `--gaps` tries values of --background-gap-ms. A real server and its clients share the
machine, which should do nothing else; without and with the backlog take turns, `--rounds` times, and are pooled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ropeway.bench.datasets import FileTokens, Sample, text_of_length
from ropeway.bench.http import HttpClient
from ropeway.bench.load import run_load
from ropeway.bench.spawn import serving
from ropeway.bench.wire import Call
from ropeway.config import EngineConfig
from ropeway.hub import locate
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.simulate import capacity, simulate
from ropeway.sim.workload import Arrival, Traffic, endless, generate, scale

SEED, OTHER = 11, 12
WORKERS = 1.5
"""Requests of the backlog that a real server has at a time, for each of its seats."""
MODEL_FLAGS = {"--dtype", "--quantization", "--kv-cache-dtype", "--threads"}
"""What `--flags` cannot change, since the offline run does not see them."""


@dataclass
class Seen:
    """What the chats of one kind of run saw, in seconds, and the tokens that were computed for all in `seconds`."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: float = 0.0
    seconds: float = 0.0

    def p99(self) -> tuple[float, float]:
        return float(np.percentile(self.ttft, 99)), float(np.percentile(self.gaps, 99))

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Comparison:
    """`gap_ms` is the setting, None the default. `offline` is in tokens a second."""

    load: float
    gap_ms: float | None
    alone: Seen
    beside: Seen
    offline: float

    @property
    def ratios(self) -> tuple[float, float, float, float]:
        """Of p99 TTFT and p99 gap, beside over alone; of tokens a second over offline, alone and beside."""
        (ttft, gap), (ttft_beside, gap_beside) = self.alone.p99(), self.beside.p99()
        return (ttft_beside / ttft, gap_beside / gap, self.alone.rate / self.offline, self.beside.rate / self.offline)

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {"load": self.load, "gap_ms": self.gap_ms, "offline_tokens_per_s": self.offline}
        for name, seen in (("alone", self.alone), ("beside", self.beside)):
            at = {f"p{p}_{what}_ms": 1000 * float(np.percentile(values, p))
                  for what, values in (("ttft", seen.ttft), ("itl", seen.gaps)) for p in (50, 99)}  # fmt: skip
            found[name] = {"tokens_per_s": seen.rate, "requests": len(seen.ttft), **at}
        names = ("ttft_p99_ratio", "itl_p99_ratio", "alone_of_offline", "beside_of_offline")
        return found | dict(zip(names, self.ratios, strict=True))


def chats(count: int, seed: int, shape: str, length: float, longest: int) -> list[Arrival]:
    """One a second on average, a Poisson process whatever the shape; prompts have at most `longest` tokens."""
    found = scale(generate(Traffic(workload=shape, count=count, rate=1.0, seed=seed)), length=length)
    times = [a.at for a in generate(Traffic(workload="poisson", count=count, rate=1.0, seed=seed))]
    return [
        dataclasses.replace(a, at=at, prompt=((a.prompt[0][0], min(a.prompt_len, longest)),))
        for a, at in zip(found, times, strict=True)
    ]


def tokens_of(arrival: Arrival) -> int:
    """What is computed for it: the last token of an answer is not."""
    return arrival.prompt_len + arrival.output_len - 1


# In virtual time


def simulated(profile: Profile, options: argparse.Namespace) -> Iterator[Comparison]:
    seats = options.seats
    config = EngineConfig(max_num_seqs=seats, max_num_batched_tokens=max(512, 8 * seats))
    people, work = (chats(options.count, seed, options.workload, options.length_scale, 1500) for seed in (SEED, OTHER))
    eager = dataclasses.replace(config, step_budget_ms=0.0)
    at_most = capacity(people, profile, config)
    offline = capacity(work, profile, eager) * sum(map(tokens_of, work)) / len(work)
    for load in options.loads:
        arrivals = scale(people, rate=load * at_most)
        alone = virtual(arrivals, [], profile, config)
        for gap in options.gaps:
            beside = virtual(arrivals, work, profile, dataclasses.replace(config, background_gap_ms=gap))
            yield Comparison(load, gap, alone, beside, offline)


def virtual(arrivals: Sequence[Arrival], work: Sequence[Arrival], profile: Profile, config: EngineConfig) -> Seen:
    run = simulate(arrivals, profile, config, backlog=endless(work) if work else ())
    if not all(o.ok for o in run.outcomes):
        raise SystemExit("Not all chats were served: the load is too high to compare.")
    warm, many = len(arrivals) // 20, len(run.gaps) // 20
    gaps = np.repeat(np.asarray(run.gaps)[many:], np.asarray(run.gap_counts)[many:])
    return Seen([o.first or 0.0 for o in run.outcomes[warm:]], gaps.tolist(), run.computed, run.seconds)


# On a real server


def measured(options: argparse.Namespace) -> Iterator[Comparison]:
    tokens = FileTokens(str(locate(options.model)))
    shape = options.workload, options.length_scale, 1500
    work = samples_of(chats(2000, OTHER, *shape), tokens)
    offline = offline_rate(options.model, work[: options.offline_requests], options.seats)
    print(f"offline: {offline:,.0f} tokens/s\n", flush=True)
    people = chats(2000, SEED, *shape)
    each = sum(map(tokens_of, people)) / len(people)
    flags = ["--max-num-seqs", str(options.seats), "--max-queue", "4096", *options.flags.split()]
    for load in options.loads:
        rate = load * offline / each
        arrivals = scale(people[: max(10, round(rate * options.seconds))], rate=rate)
        samples, due = samples_of(arrivals, tokens), [a.at for a in arrivals]
        alone, beside = Seen(), Seen()
        for _ in range(options.rounds):
            for seen, workers in ((alone, 0), (beside, round(WORKERS * options.seats))):
                with serving(options.model, flags) as url:
                    asyncio.run(phase(url, samples, due, work, workers, options.warm, seen))
        yield Comparison(load, None, alone, beside, offline)


def samples_of(arrivals: Sequence[Arrival], tokens: FileTokens) -> list[Sample]:
    rng = np.random.default_rng(SEED)
    return [Sample(text_of_length(tokens, a.prompt_len, rng), a.prompt_len, a.output_len) for a in arrivals]


def offline_rate(model: str, work: Sequence[Sample], seats: int) -> float:
    """Tokens a second of `LLM.generate` over all of `work`, on as many seats as the server has."""
    from ropeway import LLM, SamplingParams

    asked = [SamplingParams(temperature=0.0, max_tokens=s.output_len, ignore_eos=True) for s in work]
    with LLM(model, max_num_seqs=seats) as llm:
        llm.generate([s.prompt for s in work[:4]], asked[:4], use_tqdm=False)
        begun = time.perf_counter()
        answers = llm.generate([s.prompt for s in work], asked, use_tqdm=False)
        seconds = time.perf_counter() - begun
    return sum(len(a.prompt_token_ids) + len(a.outputs[0].token_ids) - 1 for a in answers) / seconds


async def phase(
    url: str,
    samples: Sequence[Sample],
    due: Sequence[float],
    work: Sequence[Sample],
    workers: int,
    warm: float,
    seen: Seen,
) -> None:
    """Send `samples` when they are `due`, beside `workers` that keep a backlog going, and add what was seen after
    `warm` seconds to `seen`."""
    people, background = HttpClient(url), HttpClient(url, {"x-ropeway-priority": "low"})
    listed = msgspec.json.decode(bytes((await people.request("GET", "/v1/models")).body))
    model = listed["data"][0]["id"]
    endless_work = itertools.cycle(work)

    async def keep_going() -> None:
        while True:
            sample = next(endless_work)
            body = {"model": model, "prompt": sample.prompt, "max_tokens": sample.output_len, "temperature": 0.0}
            sent = msgspec.json.encode({**body, "ignore_eos": True})
            answer = await background.request("POST", "/v1/completions", sent)
            if answer.status != 200:
                raise SystemExit(f"The backlog was refused: {answer.status} {answer.body[:300]!r}")

    async def count() -> tuple[float, float]:
        text = (await people.request("GET", "/metrics")).body.decode()
        wanted = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return time.perf_counter(), sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(wanted)
        )

    async def count_after(seconds: float) -> tuple[float, float]:
        await asyncio.sleep(seconds)
        return await count()

    extra = {"skip_special_tokens": False}  # else they would have no text, and the gap after one be that of two steps
    call = Call(backend="openai-chat", endpoint="/v1/chat/completions", model=model, ignore_eos=True, extra=extra)
    tasks = [asyncio.create_task(keep_going()) for _ in range(workers)]
    try:
        first, last = asyncio.create_task(count_after(warm)), asyncio.create_task(count_after(due[-1]))
        begun = time.perf_counter()
        run = await run_load(people, call, samples, due)
        (since, before), (until, after) = await first, await last
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        people.close()
        background.close()
    failed = [o.error for o in run.outcomes if not o.ok]
    if failed:
        raise SystemExit(f"{len(failed)} chats failed: {failed[0]}")
    steady = [o for o in run.outcomes if o.started >= begun + warm]
    seen.ttft += [o.ttft for o in steady]
    seen.gaps += [gap for o in steady for gap in o.itls]
    seen.tokens, seen.seconds = seen.tokens + after - before, seen.seconds + until - since


# What came of it


def told(found: Comparison) -> str:
    """A row of the table."""
    setting = "default" if found.gap_ms is None else f"{found.gap_ms:g}"
    cells = [f"{found.load:g}", setting]
    for alone, beside, ratio in zip(found.alone.p99(), found.beside.p99(), found.ratios, strict=False):
        cells += [f"{1000 * alone:.1f}", f"{1000 * beside:.1f}", f"{ratio:.2f}"]
    cells += [f"{1000 * float(np.median(seen.gaps)):.1f}" for seen in (found.alone, found.beside)]
    cells += [f"{100 * share:.0f}" for share in found.ratios[2:]]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| load | gap setting (ms) | TTFT p99 alone (ms) | beside | ratio | gap p99 alone (ms) | beside | ratio | gap p50 alone \
(ms) | beside | tokens/s alone (% of offline) | beside |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def draw(found: Sequence[Comparison], path: Path, title: str) -> None:
    """Distributions at the middle load with the default setting; ratios and throughput over the loads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = [one for one in found if one.gap_ms is None]
    shown = own[len(own) // 2]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplot_mosaic([["ttft", "gap"], ["ratio", "rate"]])
    colors = {"alone": "#2a6f97", "beside a backlog": "#e07a5f"}
    for cell, what in (("ttft", "time to first token"), ("gap", "gap between tokens")):
        for (name, color), seen in zip(colors.items(), (shown.alone, shown.beside), strict=True):
            values = np.sort(seen.ttft if cell == "ttft" else seen.gaps) * 1000
            cells[cell].plot(values, np.arange(1, len(values) + 1) / len(values), color=color, label=name)
        cells[cell].set_xscale("log")
        cells[cell].axhline(0.99, color="#999999", linewidth=0.8, linestyle=":")
        cells[cell].set_xlabel(f"{what} (ms), load {shown.load:g}")
        cells[cell].set_ylabel("share")
    cells["ttft"].legend(frameon=False)
    loads = [one.load for one in own]
    for name, part, color in (("TTFT p99", 0, "#2a6f97"), ("gap p99", 1, "#6d597a")):
        cells["ratio"].plot(loads, [one.ratios[part] for one in own], color=color, marker="o", label=name)
    cells["ratio"].axhline(1.1, color="#999999", linewidth=0.8, linestyle=":")
    cells["ratio"].set_ylim(bottom=0)
    cells["ratio"].set_ylabel("beside a backlog / alone")
    for (name, color), part in zip(colors.items(), (2, 3), strict=True):
        cells["rate"].plot(loads, [100 * one.ratios[part] for one in own], color=color, marker="o", label=name)
    cells["rate"].axhline(90, color="#999999", linewidth=0.8, linestyle=":")
    cells["rate"].set_ylim(bottom=0)
    cells["rate"].set_ylabel("tokens/s, % of offline")
    for cell in ("ratio", "rate"):
        cells[cell].set_xlabel("chats, as a share of what the server can do")
        cells[cell].legend(frameon=False)
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def gaps_of(text: str) -> list[float | None]:
    return [None if word == "default" else float(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--profile", help="simulate this machine instead: a shipped profile, or one of `calibrate`")
    parser.add_argument("--loads", default="0.2,0.4,0.6", type=lambda text: [float(word) for word in text.split(",")])
    parser.add_argument("--workload", default="sharegpt", help="whose lengths chats have: sharegpt, azure-conv, ...")
    parser.add_argument("--length-scale", type=float, default=0.5)
    parser.add_argument("--seats", type=int, default=64)
    parser.add_argument("--count", type=int, default=3000, help="chats of each simulation")
    parser.add_argument("--gaps", default="default", type=gaps_of, help="values of --background-gap-ms to simulate")
    parser.add_argument("--seconds", type=float, default=40.0, help="of chats in each round on a real server")
    parser.add_argument("--warm", type=float, default=8.0, help="seconds of them that are not measured")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--offline-requests", type=int, default=400)
    parser.add_argument("--flags", default="", help="further flags for the server, separated by spaces")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    words = {word.partition("=")[0] for word in options.flags.split()}
    if unfit := sorted(words & MODEL_FLAGS):
        parser.error(f"--flags with {', '.join(unfit)}: the offline run would be another model's")
    if options.plot and None not in options.gaps:
        parser.error("--plot shows the default gap, which is not among --gaps")
    if options.profile:
        profile = load_profile(options.profile)
        title = str(profile)
        runs = simulated(profile, options)
    else:
        title = f"a real server of {options.model}, {options.rounds} rounds of {options.seconds:g} s"
        runs = measured(options)
    print(title, flush=True)
    found: list[Comparison] = []
    for one in runs:
        if not found:
            print(HEAD)
        found.append(one)
        print(told(one), flush=True)
    if options.output_json:
        options.output_json.write_text(json.dumps([one.fields() for one in found], indent=1) + "\n")
    if options.plot:
        draw(found, options.plot, title)


if __name__ == "__main__":
    main()
