"""Imports only point down, the perfect part stays small, and the picture in the docs is the real graph."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "ropeway"

FLOORS: list[tuple[str, ...]] = [
    ("contract", "config", "errors", "checkpoint", "modelspec", "hub", "_version"),
    ("scheduler", "kv", "text", "store", "experiment"),
    ("engine", "recorder", "remote", "scene", "sim", "runtime"),
    ("service", "observe", "bench", "accounts", "client"),
    ("api", "jobs"),
    ("gateway",),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEIGHBOURS = {
    ("scheduler", "kv"),
    ("recorder", "engine"),
    ("remote", "engine"),
    ("remote", "recorder"),
    ("remote", "scene"),
    ("sim", "engine"),
    ("sim", "recorder"),
    ("sim", "remote"),
    ("sim", "scene"),
    ("api", "jobs"),
    ("modelspec", "checkpoint"),
    *((room, "errors") for room in FLOORS[0]),
}
"""Imports on one floor that are meant: who may use whom."""

LAZY_TORCH = {"service/llm.py"}
"""Outside `runtime`, who may load it late, inside a function."""

TORCHLESS = (
    "scheduler", "modelspec", "hub", "runtime.memory", "remote.host", "service.service", "service.llm", "service.echo",
)  # fmt: skip

SCHEDULER_NEEDS = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "hashlib", "heapq", "itertools", "math", "struct",
    "typing", *(f"ropeway.{room}" for room in ("contract", "errors", "kv", "scheduler")),
}  # fmt: skip
"""No clock, no I/O, no randomness: what `scheduler` and `kv` may import."""


def room_of(path: Path) -> str:
    parts = path.relative_to(SRC).parts
    return parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(SRC.rglob("*.py")) if path.name != "__main__.py" and path != SRC / "__init__.py"]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level of the file) of each import, not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module or "", top))
                if child.module == "ropeway":
                    found.extend((f"ropeway.{alias.name}", top) for alias in child.names)
            walk(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(tree, True)
    return found


def graph() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = defaultdict(set)
    for path in modules():
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == "ropeway" and len(parts) > 1 and parts[1] != room_of(path) and parts[1] in FLOOR:
                edges[room_of(path)].add(parts[1])
    return edges


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in modules()}
    assert rooms - {"bundled"} == FLOOR.keys()


def test_imports_point_down() -> None:
    wrong = [
        f"{room} -> {used}"
        for room, targets in graph().items()
        for used in targets
        if FLOOR[used] >= FLOOR[room] and (room, used) not in NEIGHBOURS
    ]
    assert not wrong
    used_so = {(room, used) for room, targets in graph().items() for used in targets}
    assert {pair for pair in NEIGHBOURS if pair[1] != "errors"} <= used_so, "allowed for nobody"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("runtime", "scheduler"), ("runtime", "engine"), ("api", "engine.engine"), ("api", "remote")],
)
def test_who_must_not_know_whom(room: str, forbidden: str) -> None:
    for path in modules():
        if room_of(path) == room:
            assert not [m for m, _ in imports(path) if m.startswith(f"ropeway.{forbidden}")], path


def test_torch_lives_in_the_runtime() -> None:
    for path in modules():
        if room_of(path) == "runtime":
            continue
        name = path.relative_to(SRC).as_posix()
        for module, top in imports(path):
            if module.split(".")[0] in {"torch", "transformers"}:
                assert not top, f"{name} imports {module}"
                assert name in LAZY_TORCH or name.startswith("cli/"), f"{name} imports {module}"


def test_the_scheduler_needs_the_contract_alone() -> None:
    for path in modules():
        if room_of(path) in {"scheduler", "kv"}:
            found = {".".join(m.split(".")[: 2 if m.startswith("ropeway.") else 1]) for m, _ in imports(path)}
            assert found <= SCHEDULER_NEEDS, (path, found - SCHEDULER_NEEDS)


def test_who_computes_nothing_loads_no_torch() -> None:
    """The command and the HTTP process have tests of their own."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'ropeway.{name}')\n"
        "    if {'torch', 'transformers'} & sys.modules.keys(): sys.exit(f'ropeway.{name} loads torch')"
    )
    done = subprocess.run([sys.executable, "-c", code, *TORCHLESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_can_run_code_from_data() -> None:
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for path in modules():
        assert not banned & {module.split(".")[0] for module, _ in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), f"{path}:{node.lineno}"


def test_the_scheduler_speaks_of_resources() -> None:
    for path in modules():
        if room_of(path) == "scheduler":
            text = path.read_text(encoding="utf-8").lower()
            assert not [word for word in ("lora", "encoder", "connector", "mamba", "multimodal") if word in text], path


def test_sizes() -> None:
    def lines(path: Path) -> int:
        return len(path.read_text(encoding="utf-8").splitlines())

    core = sum(lines(path) for path in modules() if room_of(path) in {"scheduler", "kv", "engine"})
    assert core < 2500, f"scheduler + kv + engine have {core} lines: too many to read in one sitting"
    large = {path.name: lines(path) for path in modules() if lines(path) > 450}
    assert not large, f"these files have outgrown their rooms: {large}"


def picture() -> str:
    """The import graph between rooms as a Mermaid drawing, upper floors first."""
    edges = graph()
    present = {room_of(path) for path in modules()} & FLOOR.keys() - {"_version"}
    lines = ["```mermaid", "flowchart TD"]
    for number in range(len(FLOORS) - 1, -1, -1):
        rooms = [room for room in FLOORS[number] if room in present]
        if rooms:
            lines.append(f"    subgraph F{number}")
            lines += [f"        {room}" for room in rooms]
            lines.append("    end")
    # Everybody uses the ground floor; drawing that would hide the rest.
    for room in sorted(edges, key=lambda r: (-FLOOR[r], r)):
        for used in sorted(edges[room] - {"_version"}):
            if FLOOR[used] > 0:
                lines.append(f"    {room} --> {used}")
    return "\n".join([*lines, "```"])


def test_the_picture_in_the_docs_is_the_import_graph() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert picture() in page, f"replace the drawing in docs/architecture.md by:\n{picture()}"


if __name__ == "__main__":
    print(picture())
