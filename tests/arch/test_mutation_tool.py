"""The tool behind `make mutation`: it plants the mistakes that it says, and finds out whether tests notice them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "mutation"


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOL))
    import mutants

    return mutants


SOURCE = '''
"""A docstring is no program."""
from typing import Literal
Mode = Literal["a", "b"]
MOST = 4

def clamp(values: list[int], low: int = 0) -> list[int]:
    """Nor is this."""
    kept = [max(value, low) for value in values if value is not None]
    for index in range(1, 9):
        if not low < index and kept:
            continue
        kept.append(index)
    if low > 3:
        raise ValueError(f"{low + 1} is too much")
    return kept[:MOST]
'''


def test_mistakes_are_small_and_say_what_they_are(operators: ModuleType) -> None:
    found = {(mutant.where, mutant.before, mutant.after) for mutant in operators.mutants(Path("m.py"), SOURCE)}
    after = {after for _, _, after in found}
    kept = "kept = [max(value, low) for value in values if value is not None]"
    for change in (
        "MOST = 5",
        "return",
        "def clamp(values: list[int], low: int=1) -> list[int]:",
        kept.replace("max", "min"),
        kept.replace("is not", "is"),
        kept.replace(" if value is not None", ""),
        "for index in ():",
        "for index in range(9, 1):",
        "for index in range(1, 10):",
        "if not low <= index and kept:",
        "if not low >= index and kept:",
        "if low < index and kept:",
        "if not low < index or kept:",
        "if kept:",
        "break",
        "pass",
        "if low >= 3:",
        "if low > 4:",
        "return kept[:]",
    ):
        assert change in after, change
    assert not [one for one in found if "too much" in one[1] and one[2] != "pass"], "texts for people stay"
    assert not [one for one in after if "Literal" in one or "docstring" in one]
    assert {where for where, _, _ in found} == {"", "clamp"}


def test_a_mutant_is_the_program_with_that_one_change(operators: ModuleType) -> None:
    def ends(code: object) -> list[int]:
        space: dict[str, object] = {}
        exec(code, space)  # type: ignore[call-overload]
        return space["clamp"]([1, None], 0)  # type: ignore[operator, no-any-return]

    plain = [1, 1, 2, 3]
    listed = operators.mutants(Path("m.py"), SOURCE)
    by_change = {mutant.after: mutant for mutant in listed}
    assert ends(by_change["MOST = 5"].code()) != plain
    assert ends(compile(SOURCE, "m.py", "exec")) == ends(by_change["if low > 4:"].code()), "the others are undone"


PROGRAM = """
STEP = 1

def rise(value, low, high):
    while value < low:
        value += STEP
    return min(value, high)
"""
WEAK = """
from program import rise

def test_it_returns():
    assert rise(1, 2, 3) is not None
"""
STRONG = """
from program import rise

def test_bounds():
    assert [rise(value, 2, 4) for value in range(7)] == [2, 2, 2, 3, 4, 4, 4]
"""
LISTED = """
[[mutant]]
where = "program.rise"
before = "while value < low:"
after = "while value <= low:"
why = "for the sake of the example"

[[mutant]]
where = "program.rise"
before = "gone"
after = "also gone"
why = "it was here once"
"""


def tried(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--root", str(folder), "--sources", "program.py", "--jobs", "2", *options]
    return subprocess.run(
        [*command, "--patience", "1", "--equivalent", str(folder / "listed.toml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_weak_tests_let_mistakes_pass_and_strong_ones_do_not(tmp_path: Path) -> None:
    for name, text in (("program", PROGRAM), ("test_weak", WEAK), ("test_strong", STRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "listed.toml").write_text(LISTED)
    weak = tried(tmp_path, "--tests", "test_weak.py")
    assert weak.returncode == 1, weak.stdout + weak.stderr
    assert (
        "program.py:7 rise (survived 1 tests)\n-    return min(value, high)\n+    return max(value, high)"
        in weak.stdout
    )
    assert "what is no mutant any more: program.rise: gone -> also gone" in weak.stdout
    strong = tried(tmp_path, "--tests", "test_weak.py", "test_strong.py", "--least", "100")
    assert strong.returncode == 0, strong.stdout + strong.stderr
    [*_, row] = [line.split() for line in strong.stdout.splitlines() if line.startswith("all ")]
    count, killed, late, survived, equivalent, share = row[1:]
    assert (int(survived), int(equivalent), share) == (0, 1, "100.0%")
    assert int(killed) + int(late) + 1 == int(count)
    assert int(late) > 0, "a loop without end is noticed"
    (tmp_path / "test_weak.py").write_text(WEAK.replace("is not None", "is None"))
    failing = tried(tmp_path, "--tests", "test_weak.py")
    assert failing.returncode == 2
    assert "The tests fail without any mutant." in failing.stderr
