"""Runs chosen tests in a forked process, with a change in the program.

There are two ways. A changed body of a function is put in its place in a process that has imported and collected
everything: that takes milliseconds. What is said outside of functions is done when a module is imported, so for a
change there the process begins with importing the program, that module as it is changed, and with collecting.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

HERE = Path(__file__).resolve().parent
_BROKEN = 97
MEMORY = 4 << 30
"""Bytes of address space of a trial: what grows without end is to hurt nobody else."""


@dataclass
class Test:
    """A test as the unchanged program passes it: `seconds` of processor time, and the functions of the program that it
    calls, as (file, qualified name)."""

    name: str
    file: str
    seconds: float = 0.0
    calls: set[tuple[str, str]] = field(default_factory=set)


class Swap(MetaPathFinder):
    """Gives one module other code as soon as it is imported."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        self._module, self._path, self._code = module, path, code

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        return spec_from_file_location(fullname, self._path, loader=_Given(fullname, str(self._path), self._code))


class _Given(SourceFileLoader):
    def __init__(self, fullname: str, path: str, code: CodeType) -> None:
        super().__init__(fullname, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Chosen:
    """Lets pytest run these tests alone, in that order, and ends the process if one takes `patience` seconds more than
    four times its own of processor time."""

    def __init__(self, tests: list[Test], patience: float) -> None:
        self._place = {test.name: place for place, test in enumerate(tests)}
        self._tests, self._patience = tests, patience

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._place), key=lambda item: self._place[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        test = self._tests[self._place[item.nodeid]]
        signal.setitimer(signal.ITIMER_PROF, self._patience + 4 * test.seconds)


class _Watch:
    """Notes what each test costs and which functions of `files` it calls. Those that take longer than so many seconds
    are broken off and left out."""

    def __init__(self, files: set[str], longest: float) -> None:
        self._files, self._longest = files, longest
        self._too_long = False
        self.tests: list[Test] = []
        signal.signal(signal.SIGPROF, self._enough)

    def _enough(self, number: int, frame: FrameType | None) -> None:
        self._too_long = True
        self.tests.pop()
        raise TimeoutError("it takes too long")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[object]:
        self._too_long = False
        signal.setitimer(signal.ITIMER_PROF, self._longest)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self._too_long:  # it is no failure, whatever has become of the exception on its way
            report.outcome, report.longrepr = "passed", None
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[object]:
        test = Test(item.nodeid, str(item.path))
        self.tests.append(test)

        def look(frame: FrameType, event: str, arg: Any) -> None:
            code = frame.f_code
            if code.co_filename in self._files:
                test.calls.add((code.co_filename, code.co_qualname.replace(".<locals>", "")))

        begun = time.process_time()
        sys.settrace(look)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            test.seconds = time.process_time() - begun


def survey(files: Iterable[str], root: Path, sources: set[str], longest: float) -> tuple[int, list[Test], list[str]]:
    """Run all tests in `files` once, watched, in a process of its own. Returns pytest's exit status, the tests that
    take no longer than so many seconds, and the names of other people's modules that they import."""
    back, forth = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(back)
        watch = _Watch(sources, longest)
        status = _pytest([*files], root, [watch])
        told = [[test.name, test.file, test.seconds, sorted(test.calls)] for test in watch.tests]
        with os.fdopen(forth, "w") as pipe:
            json.dump([int(status), told, [name for name in sys.modules if _is_foreign(name)]], pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(forth)
    with os.fdopen(back) as pipe:
        said = pipe.read()
    os.waitpid(process, 0)
    if not said:
        raise SystemExit("The tests of the unchanged program ended their process.")
    status, told, modules = json.loads(said)
    tests = [Test(name, file, seconds, {(a, b) for a, b in calls}) for name, file, seconds, calls in told]
    return status, tests, modules


def begin(swap: Swap, tests: list[Test], root: Path, patience: float) -> int:
    """Start a trial of `tests` in a process of its own, which imports the program with what is changed. Returns the
    process id; `verdict` reads how it ended."""

    def trial() -> int:
        signal.setitimer(signal.ITIMER_PROF, patience + 5)  # for what is imported and collected
        sys.meta_path.insert(0, swap)
        return _pytest(sorted({test.file for test in tests}), root, [_Chosen(tests, patience)], "--tb=no")

    return _forked(trial, tests)


class Collected:
    """Tests that are collected once and then tried as often as one likes, by `work`, while it lasts."""

    def __init__(self, files: list[str], root: Path, work: Callable[[Collected], None]) -> None:
        self._work = work
        self._items: dict[str, pytest.Item] = {}
        _pytest(files, root, [self], "-s")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        self._work(self)
        return True

    def begin(self, function: FunctionType, code: CodeType, tests: list[Test], patience: float) -> int:
        """The same as `begin` above for a function that has another body."""

        def trial() -> int:
            function.__code__ = code
            for test in tests:
                signal.setitimer(signal.ITIMER_PROF, patience + 4 * test.seconds)
                try:
                    reports = runtestprotocol(self._items[test.name], log=False, nextitem=None)
                except Exception:  # it can bring down pytest itself, for want of memory or by endless recursion
                    return pytest.ExitCode.INTERNAL_ERROR
                if any(report.failed for report in reports):
                    return pytest.ExitCode.TESTS_FAILED
            return pytest.ExitCode.OK

        return _forked(trial, tests)


def outermost(code: CodeType, where: str) -> CodeType | None:
    """The code of the function `where`, or of the one around it, in the code of its module."""
    for part in code.co_consts:
        if isinstance(part, CodeType) and f"{where}.".startswith(f"{part.co_qualname}."):
            return part if part.co_flags & inspect.CO_OPTIMIZED else outermost(part, where)
    return None


def alive(module: str, name: str) -> FunctionType:
    """The function of that qualified name in an imported module, whatever it is wrapped in."""
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType):
        found = found.fget if isinstance(found, property) else found.__func__
    return inspect.unwrap(found)


def _forked(trial: Callable[[], int], tests: list[Test]) -> int:
    process = os.fork()
    if process:
        return process
    status = _BROKEN
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(120 + round(40 * sum(test.seconds for test in tests)))  # in case that it waits for something
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        status = int(trial())
    finally:
        os._exit(status)


def verdict(status: int) -> str:
    """`killed`, `timeout` or `survived`, by the status that `os.wait` has given. Raises RuntimeError if it could not be
    tried."""
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else "killed"
    code = os.WEXITSTATUS(status)
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED, _BROKEN):
        raise RuntimeError(f"a trial ended with status {code} before any test ran")
    return "survived" if code == pytest.ExitCode.OK else "killed"


def _pytest(files: list[str], root: Path, plugins: list[object], *more: str) -> int:
    options = ["-x", "-q", "-p", "no:cacheprovider", "-c", str(HERE / "pytest.ini"), f"--rootdir={root}"]
    return pytest.main([*options, f"--confcutdir={root}", *more, *files], plugins=plugins)


def _is_foreign(name: str) -> bool:
    return (getattr(sys.modules[name], "__file__", None) or "").startswith(_HOMES)


_HOMES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
