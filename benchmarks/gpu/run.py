"""Ropeway on a GPU, beside what the device can do at most and what others do with it, in one command.

    python benchmarks/gpu/run.py [--out DIR] [--budget SECONDS] [--only PART,...] [--without PART,...]
    python benchmarks/gpu/run.py --device cpu --tiny        # the same code in seconds, on shapes that mean nothing

Needs no checkpoint and no network: weights are random, of the published shapes of Llama-3-8B and Qwen3-0.6B. Everything
is measured in one process. If a part breaks the device's context, the parts after it go on in a new one. What was
measured is written as it comes: to a file of JSON and one of tables, named for the time and the device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
BROKEN = 3
"""Exit status of a worker whose device is of no more use."""
_PATIENCE = 3.0
"""A part may take so many times what it is expected to."""
_GRACE = 45.0
"""Seconds after the end of its time in which a part has to notice that it is over."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=RESULTS, help="directory for the results (default: %(default)s)")
    found.add_argument("--budget", type=float, default=450.0, help="seconds in all; what is least important is dropped")
    found.add_argument("--only", default="", help="parts to run, by commas (default: all)")
    found.add_argument("--without", default="", help="parts not to run, by commas")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this program, not of a device")
    found.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    found.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]  # also where Ropeway is not installed
    if options.worker is not None:
        return work(options)
    return supervise(options)


# The worker: measures, and writes a line of JSON for everything that happens.


class Journal:
    """Lines of JSON in a file, each there for good once it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **fields: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines so far; the last may have been cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def work(options: argparse.Namespace) -> int:
    import torch
    from layouts import FULL, TINY
    from measure import Deadline, OutOfTime, slug, surroundings
    from parts import PARTS, Bench, affordable

    from ropeway.errors import ConfigError

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device. Use --device cpu --tiny to try this program out.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    journal = Journal(options.worker)
    about = surroundings(device)
    journal.write(kind="surroundings", slug=slug(about), about=about)
    names = options.only.split(",")
    left = [part for part in PARTS if part.name in names]
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(device, TINY if options.tiny else FULL, Path(place))
        for line in read(options.worker):
            match line:  # what parts in an earlier worker have found for those that are left
                case {"kind": "row", "part": "ceilings", "row": row}:
                    bench.ceilings.learn(row)
                case {"kind": "row", "part": "offline", "row": row}:
                    bench.requests_s = row["requests_s"]
        while left:
            part, begun = left[0], time.monotonic()
            remaining = options.until - time.time()
            if part.name not in affordable(left, remaining) and not options.tiny:
                journal.write(kind="dropped", part=part.name, needs=part.seconds, left=round(remaining))
                left.pop(0)
                continue
            allowed = max(1.0, min(_PATIENCE * part.seconds, remaining))
            journal.write(kind="begun", part=part.name, end=time.time() + allowed)
            deadline = Deadline(allowed)
            status = "done"
            try:
                for row in part.run(bench, deadline):
                    journal.write(kind="row", part=part.name, row=row)
            except OutOfTime:
                status = "cut off"
            except ConfigError as error:  # a GPU may lack what a part needs
                status = f"not here: {error}"
            except Exception as error:
                traceback.print_exc()
                status = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            seconds = round(time.monotonic() - begun, 1)
            print(f"{part.name}: {status} after {seconds} s", flush=True)
            journal.write(kind="ended", part=part.name, status=status, seconds=seconds)
            if status != "done" and not _sound(bench):
                return BROKEN
            left.pop(0)
        bench.close()
    return 0


def _sound(bench: Any) -> bool:
    """Whether the device still works after a part went wrong. What that part had open is closed."""
    import torch

    try:
        bench.close()
        return float(torch.ones(8, device=bench.device).sum()) == 8.0
    except Exception:
        return False


# The supervisor: starts workers until there is nothing left to measure, and says what was found. Needs no torch.


def supervise(options: argparse.Namespace) -> int:
    from tables import PARTS_SHOWN, markdown

    begun = time.time()
    only = options.only.split(",") if options.only else list(PARTS_SHOWN)
    without = options.without.split(",") if options.without else []
    if unknown := [name for name in (*only, *without) if name not in PARTS_SHOWN]:
        print(f"There is no part {unknown[0]!r}. Parts: {', '.join(PARTS_SHOWN)}.", file=sys.stderr)
        return 2
    names = [name for name in only if name not in without]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "lines.jsonl"
        status = _conduct(options, names, path, begun + options.budget)
        found = collect(read(path))
        if "surroundings" not in found:
            return status or 1
        found |= {"budget": options.budget, "seconds": round(time.time() - begun, 1), "tiny": options.tiny}
        stem = options.out / f"{time.strftime('%Y-%m-%d-%H%M')}-{'tiny-' if options.tiny else ''}{found['slug']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(found)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {stem}.json and .md in {found['seconds']:.0f} s")
    return 1 if any(status.startswith("failed") for status in found["status"].values()) else 0


def _conduct(options: argparse.Namespace, names: list[str], path: Path, until: float) -> int:
    """Run workers until every part has ended or there is no more time. Returns the last one's exit status."""
    status = 0
    words = [sys.executable, str(Path(__file__).resolve()), "--device", options.device, "--worker", str(path)]
    while names:
        more = [*(["--tiny"] if options.tiny else []), "--until", str(until), "--only", ",".join(names)]
        status = _watch([*words, *more], path, until)
        ended = {line["part"] for line in read(path) if line["kind"] in ("ended", "dropped")}
        begun = [line["part"] for line in read(path) if line["kind"] == "begun" and line["part"] not in ended]
        if begun:  # the worker died of it
            Journal(path).write(kind="ended", part=begun[-1], status=f"failed: exit status {status}", seconds=0.0)
            ended.add(begun[-1])
        names = [name for name in names if name not in ended]
        if status == 0 or time.time() > until or not (begun or status == BROKEN):
            break
    for name in names:
        Journal(path).write(kind="ended", part=name, status="not reached", seconds=0.0)
    return status


def _watch(words: list[str], path: Path, until: float) -> int:
    """Run a worker and return its exit status. It is killed if a part does not end long after it should have."""
    with subprocess.Popen(words, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as worker:
        while worker.poll() is None:
            begun = [line for line in read(path) if line["kind"] == "begun"]
            if time.time() > (min(until, begun[-1]["end"]) if begun else until) + _GRACE:
                worker.kill()
            try:
                worker.wait(1.0)
            except subprocess.TimeoutExpired:
                continue
        return worker.returncode


def collect(lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """What the lines say: the surroundings, rows by part, and what became of each part."""
    found: dict[str, Any] = {"rows": {}, "status": {}, "took": {}}
    for line in lines:
        match line["kind"]:
            case "surroundings":
                found["surroundings"], found["slug"] = line["about"], line["slug"]
            case "row":
                found["rows"].setdefault(line["part"], []).append(line["row"])
            case "dropped":
                found["status"][line["part"]] = f"dropped: needs about {line['needs']} s, {line['left']} s were left"
            case "ended":
                found["status"][line["part"]] = line["status"]
                found["took"][line["part"]] = line["seconds"]
    return found


if __name__ == "__main__":
    sys.exit(main())
