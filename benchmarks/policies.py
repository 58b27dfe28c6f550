"""The policy study: what orders, budgets and preemption do to the same traffic, on the real scheduler in virtual time.

    python benchmarks/policies.py                                      # synthetic traffic with the published shapes
    python benchmarks/policies.py --conversation CSV --code CSV        # the Azure traces of 2023
    python benchmarks/policies.py --write docs/policies.md --plot docs/policies.png

Every number comes from the profile of an H200 with an 8B model, which is an estimate: compare rows, not machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ropeway.config import EngineConfig
from ropeway.sim.cost import CostModel
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.report import Report, Targets, report
from ropeway.sim.simulate import Run, capacity, simulate
from ropeway.sim.traces import read_trace
from ropeway.sim.workload import Arrival, Traffic, generate, merge, scale

BEGIN, END = "<!-- begin: results -->", "<!-- end: results -->"
TARGETS = Targets(ttft=2.0, gap=0.1)
ENGINE = EngineConfig(
    max_num_seqs=256, max_num_batched_tokens=2048, step_budget_ms=0, max_queue=1_000_000, scheduling_policy="fcfs"
)
LONGEST = 2048
"""What clients allow for an answer. How long it gets, nobody knows beforehand."""
MOST = 3000
"""Requests of a simulation. Some take fewer."""

Row = tuple[str, Report]


class Study:
    """Traffic and what serves it. `count` bounds the requests of each simulation."""

    def __init__(self, profile: Profile, conversation: Path | None, code: Path | None, count: int) -> None:
        self.profile, self.count = profile, count
        self.conversation = self._traffic(conversation, "azure-conv")
        self.code = self._traffic(code, "azure-code")
        self.source = {True: "the Azure traces of 2023", False: "synthetic traffic"}[conversation is not None]
        self.runs: dict[str, Run] = {}

    def _traffic(self, trace: Path | None, workload: str) -> list[Arrival]:
        found = read_trace(trace, self.count) if trace else generate(Traffic(workload=workload, count=self.count))
        return [dataclasses.replace(a, max_tokens=LONGEST) for a in found]

    def at_load(self, arrivals: Sequence[Arrival], load: float) -> list[Arrival]:
        """The same requests, so fast that they ask for `load` times what the machine can do."""
        natural = len(arrivals) / arrivals[-1].at
        return scale(arrivals, rate=load * capacity(arrivals, self.profile, ENGINE) / natural)

    def run(self, arrivals: Sequence[Arrival], label: str = "", **settings: object) -> Report:
        run = simulate(arrivals, self.profile, dataclasses.replace(ENGINE, **settings))  # type: ignore[arg-type]
        if label:
            self.runs[label] = run
        return report(run, TARGETS)


def orders(study: Study) -> Iterator[str]:
    for name, arrivals in (("conversation", study.conversation), ("code", study.code)):
        at = study.at_load(arrivals, 1.0)
        rules: dict[str, dict[str, object]] = {
            "fcfs": {}, "sjf": {}, "sjf, age cap 5 s": {"scheduling_policy": "sjf", "age_cap": 5.0}, "hrrn": {},
        }  # fmt: skip
        found = {
            label: study.run(at, f"{name}: {label}", **{"scheduling_policy": label, **more})
            for label, more in rules.items()
        }
        yield f"### Who boards next: Azure {name} at load 1.0"
        yield ""
        yield from latencies(list(found.items()))
        yield ""
        fcfs = found.pop("fcfs").ttft
        for label, other in found.items():
            yield (
                f"- `{label}`: median TTFT {other.ttft['p50'] / fcfs['p50']:.2f} of that of `fcfs`, 99th percentile "
                f"{other.ttft['p99'] / fcfs['p99']:.2f}."
            )
        yield ""


def fairness(study: Study) -> Iterator[str]:
    """One tenant asks for a fifth of what the machine can do, alone and beside one that asks for twice all of it."""
    count = min(study.count // 4, 750)
    good = study.at_load(study.conversation[:count], 0.2)
    flood = generate(Traffic(workload="sharegpt", count=16 * count, seed=2))
    flood = study.at_load([dataclasses.replace(a, max_tokens=LONGEST) for a in flood], 2.0)

    def named(number: int, arrival: Arrival) -> Arrival:
        return dataclasses.replace(arrival, tenant=("good", "flood")[number])

    def own(profile: Profile, engine: EngineConfig, *streams: list[Arrival]) -> Report:
        run = simulate(merge(*streams, rename=named), profile, engine)
        return report(
            dataclasses.replace(run, outcomes=[o for o in run.outcomes if o.arrival.tenant == "good"]), TARGETS
        )

    flood = [a for a in flood if a.at <= good[-1].at]
    paced = dataclasses.replace(ENGINE, step_budget_ms=None)  # the default: a newcomer waits for no long step to end
    half = dataclasses.replace(paced, max_num_seqs=paced.max_num_seqs // 2)
    fair = dataclasses.replace(paced, scheduling_policy="fair")
    found = {
        "alone on the whole machine": own(study.profile, paced, good),
        "alone on half of it": own(halved(study.profile), half, good),
        "beside the flood, fcfs": own(study.profile, paced, good, flood),
        "beside the flood, fair": own(study.profile, fair, good, flood),
    }
    yield "### One tenant floods the server"
    yield ""
    yield (
        "Figures are the other tenant's, whose conversations ask for a fifth of what the machine can do. The flood has "
        "ShareGPT's lengths and asks for twice all of it. Half a machine has half the seats and memory, and its steps "
        "take twice as long: what each of two tenants is owed."
    )
    yield ""
    yield from latencies(list(found.items()))
    yield ""
    whole, halves, fcfs, fair_tail = (r.ttft["p99"] for r in found.values())
    yield (
        f"With `fair` the tenant's 99th percentile of TTFT is {fair_tail / halves:.2f} times what it is alone on its "
        f"half, {fair_tail / whole:.1f} times what it is alone on the whole machine; with `fcfs` it is "
        f"{fcfs / whole:,.0f} times that."
    )
    yield ""


def halved(profile: Profile) -> Profile:
    cost = profile.cost
    twice = {f.name: 2 * getattr(cost, f.name) for f in dataclasses.fields(cost) if f.name != "bends"}
    slower = CostModel(**twice, bends=tuple((knee, 2 * slope) for knee, slope in cost.bends))
    return dataclasses.replace(profile, cost=slower, kv_tokens=profile.kv_tokens // 2)


def deadlines(study: Study) -> Iterator[str]:
    at = [dataclasses.replace(a, ttft_deadline_s=TARGETS.ttft) for a in study.at_load(study.conversation, 1.2)]
    found = {p: study.run(at, scheduling_policy=p) for p in ("fcfs", "sjf", "deadline")}
    yield f"### Overload: 1.2 times what the machine can do, first tokens wanted within {TARGETS.ttft:g} s"
    yield ""
    yield from latencies(list(found.items()))
    yield ""
    yield (
        f"`deadline` serves {found['deadline'].goodput / max(1e-9, found['fcfs'].goodput):.1f} times as many requests "
        f"in time as `fcfs`, and refuses {found['deadline'].rejected:,} early."
    )
    yield ""


def budgets(study: Study) -> Iterator[str]:
    at = study.at_load(study.conversation[:2000], 0.9)
    yield "### How much prefill beside running streams: conversation at load 0.9"
    yield ""
    rows = []
    for tokens in (256, 512, 1024, 2048, 4096, 8192):
        rows.append((f"{tokens} tokens", study.run(at, max_num_batched_tokens=tokens)))
    for ms in (20, 40, 80):
        rows.append((f"{ms} ms", study.run(at, max_num_batched_tokens=8192, step_budget_ms=ms)))
    yield from latencies(rows)
    yield ""


def preemption(study: Study) -> Iterator[str]:
    """Memory for a third of what would run: requests are put back all the time, and their blocks move or are lost."""
    yield "### What becomes of the blocks of a request that is put back: conversation at load 1.0, little KV memory"
    yield ""
    arrivals = study.conversation[: min(2000, study.count)]
    at = study.at_load(arrivals, 1.0)
    rows = []
    for title, gib in (("a host tier of 64 GiB", 64.0), ("a host tier of 2 GiB", 2.0)):
        for mode in ("recompute", "swap", "auto"):
            run = study.run(at, preemption_mode=mode, kv_host_gib=gib, num_kv_blocks=8000)
            rows.append((f"{mode}, {title}", run))
    yield from latencies(rows)
    yield ""
    for part in (rows[:3], rows[3:]):
        recompute, swap, auto = (found for _, found in part)
        rate = auto.output_rate / max(recompute.output_rate, swap.output_rate) - 1
        wait = auto.e2e["mean"] / min(recompute.e2e["mean"], swap.e2e["mean"]) - 1
        where = part[0][0].split(", ")[1]
        yield f"With {where}, `auto` is {rate:+.1%} off the better one in throughput, {wait:+.1%} in mean E2E time."
    yield ""


def low_load(study: Study) -> Iterator[str]:
    yield "### When batching does not matter: conversation at load 0.001, and at 0.9"
    yield ""
    rows = []
    for load in (0.001, 0.9):
        at = study.at_load(study.conversation[:750], load)
        rows += [(f"{mode}, load {load:g}", study.run(at, batching=mode)) for mode in ("static", "continuous")]
    yield from latencies(rows)
    yield ""


def latencies(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| | TTFT mean (s) | p50 | p99 | max | gap p50 (ms) | p99 | E2E mean (s) | output tokens/s | in time (%) "
        "| preempted (%) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for label, r in rows:
        yield (
            f"| {label} | {r.ttft['mean']:.2f} | {r.ttft['p50']:.2f} | {r.ttft['p99']:.2f} | {r.ttft['max']:.1f} | "
            f"{1000 * r.gap['p50']:.1f} | {1000 * r.gap['p99']:.1f} | {r.e2e['mean']:.2f} | {r.output_rate:,.0f} | "
            f"{100 * r.goodput:.1f} | {100 * r.preempted / r.requests:.2f} |"
        )


PARTS: dict[str, Callable[[Study], Iterator[str]]] = {
    "orders": orders, "fairness": fairness, "deadlines": deadlines, "budgets": budgets, "preemption": preemption,
    "low-load": low_load,
}  # fmt: skip


def insert(page: Path, lines: Sequence[str]) -> None:
    """Put `lines` between the page's markers."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines).rstrip() + f"\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare scheduling policies in simulation.")
    parser.add_argument("--conversation", type=Path, help="Azure conversation trace (CSV)")
    parser.add_argument("--code", type=Path, help="Azure code trace (CSV)")
    parser.add_argument("--num-requests", type=int, default=MOST, help=f"of each simulation at most (up to {MOST:,})")
    parser.add_argument("--profile", default="h200-8b-estimate")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--write", type=Path, help="page whose results to replace")
    parser.add_argument("--plot", type=Path, help="PNG with TTFT distributions of the orders")
    options = parser.parse_args()
    if bool(options.conversation) != bool(options.code):
        parser.error("--conversation and --code go together: the page says where its traffic is from")
    begun = time.perf_counter()
    study = Study(load_profile(options.profile), options.conversation, options.code, min(MOST, options.num_requests))
    lines = [f"At most {study.count:,} requests of {study.source}; {study.profile}. Targets: first token within "
             f"{TARGETS.ttft:g} s, {1000 * TARGETS.gap:g} ms a token.", ""]  # fmt: skip
    print(*lines, sep="\n")
    for part in options.parts.split(","):
        for line in PARTS[part](study):
            print(line, flush=True)
            lines.append(line)
    print(f"{time.perf_counter() - begun:.0f} s")
    if options.write:
        insert(options.write, lines)
    if options.plot:
        plot(study, options.plot)


def plot(study: Study, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for number, name in enumerate(("conversation", "code")):
        axes = figure.add_subplot(1, 2, number + 1)
        for label, run in study.runs.items():
            if label.startswith(name):
                waits = sorted(max(o.first or 0.0, 1e-3) for o in run.outcomes if o.ok)
                axes.plot(waits, [(n + 1) / len(waits) for n in range(len(waits))], label=label.split(": ")[1])
        axes.set_xscale("log")
        axes.set_xlabel("TTFT (s)")
        axes.set_ylabel("share of requests")
        axes.set_title(f"Azure {name} at load 1.0", loc="left", fontsize=10)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
