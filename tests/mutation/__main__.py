"""Mutation testing: how many small mistakes in the scheduler and the KV memory do their tests notice?

    python tests/mutation                                  every mutant; about an hour of processor time
    python tests/mutation --sample 600                     so many of them, drawn by --seed
    python tests/mutation --only scheduler/limits --jobs 1 the mutants of one file

Each mutant (see `mutants.py`) is tried in a forked process (see `trial.py`): first the tests that are done soonest, of
those that call the changed function at all, until one of them fails. A mutant that takes many times as long as the
program itself counts as noticed. Mutants that change nothing that anybody could see are listed in `equivalent.toml`
with the reason, and do not count.

The exit status is 1 if fewer than --least percent were noticed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import sys
import time
import tomllib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import CodeType

from hypothesis import HealthCheck, Phase, settings
from mutants import Mutant, mutants
from trial import Collected, Swap, Test, alive, begin, outermost, survey, verdict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ["src/ropeway/scheduler", "src/ropeway/kv"]
TESTS = ["tests/property", "tests/unit/scheduler", "tests/unit/kv", "tests/unit/test_engine.py"]
SKIPPED = ("test_text", "test_jobs")
"""Beginnings of the names of test files that have nothing to do with what is changed."""


ENDS = ("killed", "timeout", "survived", "equivalent")
Known = dict[tuple[str, str, str], str]
"""Why nobody could notice a mutant, by (function, before, after)."""


@dataclass
class Tried:
    mutant: Mutant
    verdict: str  # one of `ENDS`
    tests: list[Test]


def main() -> int:
    asked = _arguments()
    root = Path(asked.root).resolve()
    found = _mutants(asked, root)
    print(f"{len(found)} mutants of {len({mutant.path for mutant in found})} files", flush=True)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings.load_profile("mutation")
    files = [str(file) for given in asked.tests for file in _files(root / given, "test_*.py")]
    status, tests, modules = survey(files, root, {str(mutant.path) for mutant in found}, asked.longest)
    if status != 0:
        print("The tests fail without any mutant.", file=sys.stderr)
        return 2
    for name in modules:
        with suppress(ImportError):  # of some that only their own packages can import
            importlib.import_module(name)
    tests.sort(key=lambda test: test.seconds)
    print(f"{len(tests)} tests of {sum(test.seconds for test in tests):.0f} s of processor time", flush=True)
    known = _equivalent(Path(asked.equivalent))
    tried, inside, outside = list[Tried](), list[Tried](), list[Tried]()
    for mutant in found:
        one = Tried(mutant, "survived", _touched(mutant, tests, asked.budget))
        tried.append(one)
        if _name(mutant) in known:
            one.verdict = "equivalent"
        elif one.tests:
            code = outermost(_whole(mutant.path), mutant.where)
            inner = mutant.inside and code is not None and not code.co_freevars
            (inside if inner else outside).append(one)
        else:
            print(_diff(one, root), flush=True)
    gc.freeze()
    _try_all(outside, lambda one: begin(_swap(one.mutant), one.tests, root, asked.patience), root, asked.jobs)

    def collected(all_tests: Collected) -> None:
        gc.freeze()

        def start(one: Tried) -> int:
            code = outermost(one.mutant.code(), one.mutant.where)
            assert code is not None
            return all_tests.begin(alive(_module(one.mutant.path), code.co_qualname), code, one.tests, asked.patience)

        _try_all(inside, start, root, asked.jobs)

    Collected(files, root, collected)
    return _report(tried, known, root, asked.least, complete=not (asked.sample or asked.only))


def _arguments() -> Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=str(ROOT), help="the project's directory, to which paths are relative")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="files or directories to change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or directories of tests")
    parser.add_argument("--only", default="", help="only mutants whose file and function contain this text")
    parser.add_argument("--sample", type=int, default=0, help="try so many of the mutants")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample")
    parser.add_argument("--longest", type=float, default=15.0, help="leave out tests that take more seconds than this")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a mutant, the quickest first")
    parser.add_argument("--patience", type=float, default=3.0, help="seconds that a test has besides 4 times its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants that are tried at a time")
    parser.add_argument("--least", type=float, default=90.0, help="percentage of mutants that must be noticed")
    parser.add_argument("--equivalent", default=str(HERE / "equivalent.toml"), help="mutants that nobody could notice")
    return parser.parse_args()


def _files(given: Path, pattern: str) -> list[Path]:
    found = sorted(given.rglob(pattern)) if given.is_dir() else [given]
    return [file for file in found if not file.name.startswith(SKIPPED)]


def _mutants(asked: Namespace, root: Path) -> list[Mutant]:
    files = [file for given in asked.sources for file in _files(root / given, "*.py") if file.name != "__init__.py"]
    found = [mutant for file in files for mutant in mutants(file)]
    found = [mutant for mutant in found if asked.only in f"{mutant.path.with_suffix('')}.{mutant.where}"]
    if not asked.sample or asked.sample >= len(found):
        return found
    chosen = sorted(random.Random(asked.seed).sample(range(len(found)), asked.sample))
    return [found[number] for number in chosen]


def _equivalent(file: Path) -> Known:
    listed = tomllib.loads(file.read_text(encoding="utf-8")).get("mutant", [])
    return {(entry["where"], entry["before"], entry["after"]): entry["why"] for entry in listed}


def _name(mutant: Mutant) -> tuple[str, str, str]:
    return f"{mutant.path.stem}.{mutant.where}".rstrip("."), mutant.before, mutant.after


def _module(path: Path) -> str:
    parts = [path.stem]
    while (path.parent / "__init__.py").exists():
        path = path.parent
        parts.insert(0, path.name)
    return ".".join(parts)


def _touched(mutant: Mutant, tests: list[Test], budget: float) -> list[Test]:
    """The tests that call the changed function; what is said outside of functions concerns all that use the file."""
    file = str(mutant.path)

    def calls(test: Test) -> bool:
        return any(
            at == file and (name == mutant.where or name.startswith(f"{mutant.where}.")) for at, name in test.calls
        )

    if outermost(_whole(mutant.path), mutant.where) is not None:
        chosen = [test for test in tests if calls(test)]
    else:
        chosen = [test for test in tests if any(at == file for at, _ in test.calls)]
    spent = accumulate(test.seconds for test in chosen)
    return [test for test, seconds in zip(chosen, spent, strict=True) if seconds - test.seconds <= budget]


@cache
def _whole(path: Path) -> CodeType:
    return compile(path.read_text(encoding="utf-8"), str(path), "exec")


def _swap(mutant: Mutant) -> Swap:
    return Swap(_module(mutant.path), mutant.path, mutant.code())


def _try_all(ones: list[Tried], start: Callable[[Tried], int], root: Path, jobs: int) -> None:
    """Try the mutants, so many at a time, in the processes that `start` begins, and say who survives."""
    running, queue, begun = dict[int, Tried](), list(reversed(ones)), time.monotonic()
    while queue or running:
        while queue and len(running) < jobs:
            one = queue.pop()
            running[start(one)] = one
        process, status = os.wait()
        one = running.pop(process)
        one.verdict = verdict(status)
        if one.verdict == "survived":
            print(_diff(one, root), flush=True)
        done = len(ones) - len(queue) - len(running)
        if done % 50 == 0:
            print(f"{done} of {len(ones)} after {time.monotonic() - begun:.0f} s", flush=True)


def _diff(one: Tried, root: Path) -> str:
    mutant = one.mutant
    place = f"{mutant.path.relative_to(root)}:{mutant.line} {mutant.where}"
    return f"{place} (survived {len(one.tests)} tests)\n-    {mutant.before}\n+    {mutant.after}"


def _report(tried: list[Tried], known: Known, root: Path, least: float, *, complete: bool) -> int:
    counts: dict[Path, Counter[str]] = {}
    for one in tried:
        counts.setdefault(one.mutant.path, Counter())[one.verdict] += 1
    total = sum(counts.values(), Counter[str]())
    print("\n" + f"{'file':34}" + "".join(f"{column:>11}" for column in ("mutants", *ENDS, "noticed")))
    for name, count in [*((str(path.relative_to(root)), counts[path]) for path in sorted(counts)), ("all", total)]:
        numbers = "".join(f"{number:11}" for number in (count.total(), *(count[end] for end in ENDS)))
        print(f"{name[-33:]:34}{numbers}{_share(count):10.1f}%")
    if complete:
        gone = known.keys() - {_name(one.mutant) for one in tried}
        for where, before, after in sorted(gone):
            print(f"equivalent.toml lists what is no mutant any more: {where}: {before} -> {after}")
    return int(_share(total) < least)


def _share(count: Counter[str]) -> float:
    """The percentage that was noticed of those that can be."""
    noticed = count["killed"] + count["timeout"]
    return 100 * noticed / max(1, noticed + count["survived"])


if __name__ == "__main__":
    sys.exit(main())
