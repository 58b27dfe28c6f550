"""Run the contenders in turn, round after round, each beside measurements of the machine, and keep every result."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
from contenders import Contender
from protocol import Job, Start
from workloads import Shape, make

RUNNERS = Path(__file__).resolve().parent
SCRIPTS = {
    "ropeway": "run_ropeway.py",
    "vllm": "run_vllm.py",
    "openvino": "run_openvino.py",
    "llama.cpp": "run_llamacpp.py",
    "transformers": "run_transformers.py",
}


DISTURBED = 0.15
"""Cores kept busy by others from which a run says nothing: one descheduled thread holds up all of an engine's."""
PATIENCE = 3600.0
"""Seconds in which an engine, however slow, has to start or to have done a job."""


class EngineError(Exception):
    """An engine did not start or ended before it had answered."""


def last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


def stop(process: subprocess.Popen[Any], grace: float = 30.0) -> None:
    """End a process that leads a session of its own: by the end of its input, by a signal, then with all it started."""
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Engine:
    """One engine in a process of its own, ready to be asked. Use as a context manager.

    `startup` is the time from the command to the first token in seconds, `log` where the engine's own words are.
    """

    def __init__(self, contender: Contender, program: str, model: Path, threads: int, log: Path) -> None:
        settings, python = contender.settings, program
        if contender.engine == "llama.cpp":
            settings, python = {**settings, "binary": program}, sys.executable
        start = Start(str(model) + contender.form, threads, settings)
        self.log = log
        begun = time.perf_counter()
        with log.open("w") as words:
            self._process = subprocess.Popen(
                [python, RUNNERS / SCRIPTS[contender.engine], start.encode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env={**os.environ, **contender.environment},
                start_new_session=True,
            )
        try:
            self.version: str = self._answer()["version"]
        except BaseException:
            stop(self._process)
            raise
        self.startup = time.perf_counter() - begun

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: Job) -> float:
        """Seconds that the engine took for a job. Raises EngineError if any answer has not the length asked for."""
        assert self._process.stdin is not None
        self._process.stdin.write(job.encode() + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        wanted = [request.max_tokens for request in job.requests]
        if answer["output_tokens"] != wanted:
            raise EngineError(f"answers have {answer['output_tokens']} tokens; {wanted} were asked for")
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise EngineError(f"no answer in {PATIENCE:.0f} s:\n{last_words(self.log)}")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"exit status {self._process.wait()}:\n{last_words(self.log)}")
        return dict(json.loads(line))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)


@dataclass(frozen=True)
class Run:
    """One workload on one engine. Rates in tokens/s of output; times in s; memory in MiB (see machine.Usage).

    `decode` is the rate after the first token and `ttft` the time to it, both known for W3 alone; `machine` are the
    rates of the machine right before (see machine.probe), `idle` the cores that were busy then.
    """

    model: str
    contender: str
    workload: str
    round: int
    seconds: float
    output: float
    ttft: float | None
    decode: float | None
    startup: float
    private_mib: int
    resident_mib: int
    others: float
    idle: float
    machine: dict[str, float]
    version: str
    at: str


class Results:
    """Everything measured so far, in one file that is complete after each run: `runs` and `online` are lists of
    `Run` and `OnlineRun`, `contenders` says with which settings. Raises SystemExit if they are another machine's."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

        def where(fields: Mapping[str, Any]) -> tuple[Any, ...]:
            return fields["machine"]["cpu"], fields["machine"]["cores"], fields["threads"]

        if kept and where(kept) != where(about):
            raise SystemExit(f"{path} has runs of another machine, or with other threads; give another --out.")
        self.fields: dict[str, Any] = {"contenders": [], "runs": [], "online": [], **kept, **about}

    def describe(self, contenders: Sequence[Contender]) -> None:
        """Note the settings. Raises SystemExit if results under the same name were made with others."""
        known = {fields["name"]: fields for fields in self.fields["contenders"]}
        for contender in contenders:
            fields = asdict(contender)
            if known.setdefault(contender.name, fields) != fields:
                raise SystemExit(f"{self.path} has runs of {contender.name} with other settings; give another --out.")
        self.fields["contenders"] = list(known.values())

    def has(self, kind: str, wanted: Mapping[str, Any]) -> bool:
        """Whether such a run is there that nobody disturbed: the others are made again when the command is."""
        calm = (run for run in self.fields[kind] if run["others"] < DISTURBED)
        return any(all(run[name] == value for name, value in wanted.items()) for run in calm)

    def add(self, kind: str, run: Mapping[str, Any]) -> None:
        self.fields[kind].append(dict(run))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.fields, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def measure(engine: Engine, workload: str, vocab: int, seed: int) -> tuple[float, float, float | None]:
    """(seconds, output tokens/s, seconds to the first token). The last is known for a single stream alone, from
    another prompt of the same length that is answered by one token: every engine can be asked so."""
    job, first = make(workload, vocab, seed), None
    if len(job.requests) == 1:
        other = make(workload, vocab, -1 - seed)
        first = engine.ask(replace(other, requests=[replace(other.requests[0], max_tokens=1)]))
    seconds = engine.ask(job)
    return seconds, sum(r.max_tokens for r in job.requests) / seconds, first


@dataclass(frozen=True)
class Plan:
    """What to run: `models` is the directory that holds them, `programs` where each engine is."""

    models: Path
    names: Sequence[str]
    workloads: Sequence[str]
    rounds: int
    threads: int
    contenders: Sequence[Contender]
    programs: Mapping[str, str]
    patience: float
    logs: Path


def conduct(plan: Plan, results: Results) -> None:
    """Round by round, one engine after the other, so that a slow minute of the machine meets all of them."""
    gone: set[tuple[str, str]] = set()
    for name in plan.names:
        shape = Shape.read(plan.models / name)
        for number in range(plan.rounds):
            for contender in plan.contenders:
                turn = {"model": name, "contender": contender.name, "round": number}
                left = [w for w in plan.workloads if not results.has("runs", {**turn, "workload": w})]
                if not left or (name, contender.name) in gone:
                    continue
                if not Path(str(plan.models / name) + contender.form).exists():
                    print(
                        f"{name} {contender.name}: skipped, there is no {plan.models / name}{contender.form}",
                        flush=True,
                    )
                    gone.add((name, contender.name))
                    continue
                try:
                    _turn(plan, results, shape, name, number, contender, left)
                except (EngineError, OSError) as error:
                    print(f"{name} {contender.name}: FAILED: {error}", flush=True)
                    gone.add((name, contender.name))


def _turn(
    plan: Plan, results: Results, shape: Shape, name: str, number: int, contender: Contender, left: Sequence[str]
) -> None:
    plan.logs.mkdir(parents=True, exist_ok=True)
    log = plan.logs / f"{name}-{contender.name}-{number}.log"
    machine.wait_until_idle(plan.patience)
    with Engine(contender, plan.programs[contender.engine], plan.models / name, plan.threads, log) as engine:
        engine.ask(make("W0", shape.vocab, number))
        for workload in left:
            idle = machine.wait_until_idle(plan.patience)
            rates = machine.probe(plan.threads)
            with machine.watch(engine.pid) as usage:
                seconds, output, first = measure(engine, workload, shape.vocab, number)
            count = make(workload, shape.vocab, number).requests[0].max_tokens
            run = Run(
                model=name,
                contender=contender.name,
                workload=workload,
                round=number,
                seconds=round(seconds, 4),
                output=round(output, 2),
                ttft=first and round(first, 4),
                decode=first and round((count - 1) / (seconds - first), 2),
                startup=round(engine.startup, 2),
                private_mib=usage.private,
                resident_mib=usage.resident,
                others=usage.others,
                idle=round(idle, 3),
                machine=rates,
                version=engine.version,
                at=time.strftime("%Y-%m-%d %H:%M:%S"),
            )
            results.add("runs", asdict(run))
            print(f"{name} {workload} round {number} {contender.name}: {run.output:.1f} tokens/s", end="")
            print(f", decode {run.decode:.1f}" if run.decode else "", f"(others {run.others:.2f} cores)", flush=True)
