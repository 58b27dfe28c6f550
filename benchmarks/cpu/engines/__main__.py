"""Ropeway and other engines on one machine in one run.

    python benchmarks/cpu/engines run    --models DIR --engine vllm=PYTHON --engine llama.cpp=LLAMA_SERVER ...
    python benchmarks/cpu/engines online --models DIR --rate 2.5 ...
    python benchmarks/cpu/engines table  RESULTS.json --models DIR [--plot docs/engines.png]

Every engine lives in an environment of its own; `--engine` says where (`ropeway` and `transformers` are this one unless
given). Models come from benchmarks/cpu/peers/make_models.py, other forms of them from the converters beside it. A run
that was broken off continues where it was when it is given the same `--out`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import report
from conductor import SCRIPTS, EngineError, Plan, Results, conduct
from contenders import Contender, known, with_environment, with_settings
from workloads import Shape

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="the offline workloads")
    online = commands.add_parser("online", help="the servers under load")
    for command in (run, online):
        command.add_argument("--models", type=Path, required=True, help="directory of the models")
        command.add_argument("--names", default="S,M,Q", help="which models (default: %(default)s)")
        command.add_argument("--engine", action="append", default=[], metavar="NAME=PROGRAM", help="where an engine is")
        command.add_argument("--only", default="", help="regular expression for names of contenders")
        command.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="change a setting")
        command.add_argument(
            "--env", action="append", default=[], metavar="ENGINE.VARIABLE=VALUE", help="change an environment"
        )
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--patience", type=float, default=300.0, help="seconds to wait for an idle machine")
        command.add_argument("--out", type=Path, help="results (default: benchmarks/results/DATE-MACHINE.json)")
        command.add_argument("--logs", type=Path, default=Path("build/engines"), help="what engines print")
    run.add_argument("--workloads", default="W3,W1,W2")
    online.add_argument("--rate", type=float, action="append", required=True, help="requests/s; may be repeated")
    online.add_argument("--seconds", type=float, default=60.0)
    table = commands.add_parser("table", help="the table of a run")
    table.add_argument("results", type=Path)
    table.add_argument("--models", type=Path, required=True)
    table.add_argument("--plot", type=Path)
    return parser


def _programs(given: list[str]) -> dict[str, str]:
    programs = {"ropeway": sys.executable, "transformers": sys.executable}
    for item in given:
        name, equals, program = item.partition("=")
        if not equals or name not in SCRIPTS:
            raise SystemExit(f"--engine {item!r} is not NAME=PROGRAM with a NAME of: {', '.join(SCRIPTS)}.")
        programs[name] = program
    return programs


def _plan(options: argparse.Namespace, about: dict[str, Any]) -> Plan:
    programs = _programs(options.engine)
    native = {"avx512_bf16", "amx_bf16"} & set(about["isa"])
    contenders: list[Contender] = []
    everybody = with_settings(known(bf16_native=bool(native)), options.set)
    for contender in with_environment(everybody, options.env):
        if not re.search(options.only, contender.name):
            continue
        if contender.engine in programs:
            contenders.append(contender)
        else:
            print(f"{contender.name}: skipped, no --engine {contender.engine}=PROGRAM", flush=True)
    return Plan(
        models=options.models,
        names=options.names.split(","),
        workloads=options.workloads.split(",") if "workloads" in options else (),
        rounds=options.rounds,
        threads=options.threads,
        contenders=contenders,
        programs=programs,
        patience=options.patience,
        logs=options.logs,
    )


def _results(options: argparse.Namespace, plan: Plan, about: dict[str, Any]) -> Results:
    host = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
    default = RESULTS / f"{time.strftime('%Y-%m-%d')}-{host}-{plan.threads}t.json"
    results = Results(options.out or default, {"machine": about, "threads": plan.threads})
    results.describe(plan.contenders)
    print(f"results: {results.path}", flush=True)
    return results


async def _online(options: argparse.Namespace, plan: Plan, results: Results) -> None:
    from online import load

    for name in plan.names:
        for rate in options.rate:
            for number in range(plan.rounds):
                for contender in plan.contenders:
                    done = {"model": name, "contender": contender.name, "round": number, "rate": rate}
                    if results.has("online", done):
                        continue
                    try:
                        run = await load(plan, name, contender, number, rate, options.seconds)
                    except (EngineError, OSError) as error:
                        print(f"{name} {contender.name} online: FAILED: {error}", flush=True)
                        continue
                    results.add("online", asdict(run))
                    print(f"{name} W4 at {rate:g}/s round {number} {contender.name}: {run.output:.0f} tokens/s", end="")
                    print(f", TTFT p99 {run.ttft_p99:.0f} ms, ITL p99 {run.itl_p99:.0f} ms", flush=True)


def main() -> None:
    options = _parser().parse_args()
    if options.command == "table":
        kept, disturbed = report.calm(json.loads(options.results.read_text(encoding="utf-8")))
        names = dict.fromkeys(run["model"] for run in kept["runs"])
        found = report.tables(kept, {name: Shape.read(options.models / name) for name in names})
        parts = [report.markdown(table) for table in found]
        parts += [report.start_markdown(kept)] if kept["runs"] else []
        parts += [report.online_markdown(kept)] if kept["online"] else []
        parts += [f"{disturbed} runs were disturbed by others and left out."] if disturbed else []
        print("\n\n".join(parts))
        if options.plot:
            report.draw(found, options.plot)
        return
    # Engines lead sessions of their own; whoever ends the conductor shall end them too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine.describe()
    plan = _plan(options, about)
    results = _results(options, plan, about)
    if options.command == "run":
        conduct(plan, results)
    else:
        asyncio.run(_online(options, plan, results))


if __name__ == "__main__":
    main()
