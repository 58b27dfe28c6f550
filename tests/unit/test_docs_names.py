"""The documentation names what there is: paths, headers, metrics, variables, settings, codes, files. And every path
that a client may ask for has its place in it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ropeway.api.app import create_app, describe
from ropeway.cli import metrics_table
from ropeway.cli.main import app
from ropeway.config import EngineConfig, ServerConfig, settings
from ropeway.errors import BY_CODE
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ropeway"
PAGES = {page.name: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FOREIGN = {"from-ollama.md", "from-tgi.md", "from-vllm.md"}
"""Pages that name what other servers have."""

_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(
    r"/(?:v[12]|admin|ui)(?:/[\w{}.<>-]+)+|/(?:tokenize|detokenize|livez|readyz|health|ping|load|metrics)\b"
)
_FILE = re.compile(r"[\w.{},-]+(?:/[\w.{},-]+)+\.(?:py|cpp|h|yaml|yml|json|js|png|md)\b")
_CODE = "\n".join(file.read_text() for file in sorted(SOURCE.rglob("*.py")))
_METRIC = re.compile(r"\b(vllm:[a-z_]+|ropeway_[a-z_]+)\b")


def spans() -> list[tuple[str, str]]:
    """What pages set as code within a line."""
    return [(name, span) for name, text in PAGES.items() for span in _SPAN.findall(text)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = ServerConfig(data_dir=str(tmp_path_factory.mktemp("data")))
    server = create_app(EchoService(), config, Metrics("echo"))
    hidden = {str(getattr(route, "path", "")) for route in server.routes}
    return sorted(hidden | set(describe(server)["paths"]))


def pattern(path: str) -> re.Pattern[str]:
    """A path, with anything in place of its parameters."""
    return re.compile(re.sub(r"\\\{.*?\\\}", r"[^/\\s`\"'?|]++", re.escape(path)))


def test_paths(paths: list[str]) -> None:
    known = [pattern(path) for path in paths]
    named = {(name, path.rstrip(".")) for name, span in spans() if name not in FOREIGN for path in _PATH.findall(span)}
    assert len(named) > 60
    missing = {
        (name, path)
        for name, path in named
        # A path may be named by its beginning, as a family: `/admin/`, `/v1/jobs`.
        if not any(one.fullmatch(path) for one in known) and not any(one.startswith(path + "/") for one in paths)
    }
    assert not missing


def test_every_path_has_its_place(paths: list[str]) -> None:
    text = "\n".join(PAGES.values())
    told = re.sub(r"\\\n\s*", "", text)
    ends = r"(?![\w/{-])"  # else a longer path would do
    shown = [path for path in paths if not path.startswith("/ui/")]
    assert not [path for path in shown if not re.search(pattern(path).pattern + ends, told)]


def test_headers() -> None:
    named = {
        (name, span)
        for name, span in spans()
        if re.fullmatch(r"(x-ropeway|x-request|x-should|retry|openai)-[a-z-]+", span)
    }
    assert len(named) > 15
    assert not {(name, span) for name, span in named if f'"{span}"' not in _CODE}
    answered = set(re.findall(r'"(x-ropeway-[a-z-]+)"', _CODE))
    assert not {header for header in answered if not any(header in text for text in PAGES.values())}


def test_metrics(tmp_path: Path) -> None:
    families = [*metrics_table.shown(tmp_path), *Metrics("echo", hidden_names=True).all_families()]
    shown = {sample.name for family in families for sample in family.samples}
    shown |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    made = set(re.findall(r'"((?:vllm:|ropeway_)[a-z_]+)"', _CODE))
    named = {(name, metric) for name, span in spans() for metric in _METRIC.findall(span)}
    assert len(named) > 80
    # Those of routes, Redis and hidden names are not in the table of a plain server.
    assert not {(n, m) for n, m in named if not {m, m.removesuffix("_total")} & (shown | made) and not m.endswith("_")}


def test_variables_settings_and_codes() -> None:
    known = {setting.variable for setting in settings(EngineConfig, ServerConfig)}
    for name, text in PAGES.items():
        for variable in set(re.findall(r"\bROPEWAY_[A-Z_]+\b", text)):
            tests = (ROOT / "tests").rglob("*.py")
            assert variable in known or variable in _CODE or any(variable in file.read_text() for file in tests), (
                f"{name}: {variable}"
            )
    assert {code for text in PAGES.values() for code in re.findall(r"\bRW-[A-Z]+\b", text)} <= {*BY_CODE, "RW-CANCEL"}


def flags(command: Any) -> set[str]:
    """The options of a command and of all that stand below it."""
    own = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return own.union(*(flags(one) for one in getattr(command, "commands", {}).values()))


def test_flags() -> None:
    scripts = "\n".join(file.read_text() for file in sorted((ROOT / "benchmarks").rglob("*.py")))
    known = flags(get_command(app)) | set(re.findall(r'"(--[a-z0-9-]+)"', scripts)) | {"--help"}
    named = {
        (name, flag)
        for name, span in spans()
        if name not in FOREIGN
        for flag in re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", span)
    }
    assert len(named) > 150
    assert {(name, flag) for name, flag in named if flag not in known} <= {("tools.md", "--enable-auto-tool-choice")}


def test_files() -> None:
    """Those of the repository, and one that models have."""
    named = {(name, file) for name, span in spans() for file in _FILE.findall(span)}
    assert len(named) > 40
    homes = [
        ROOT,
        ROOT / "docs",
        SOURCE.parent,
        SOURCE,
        *(one for one in SOURCE.iterdir() if one.is_dir()),
        SOURCE / "runtime" / "kernels",
    ]
    missing = {
        (name, file)
        for name, file in named
        if not all(any((home / one).exists() for home in homes) for one in spread(file))
    }
    assert missing <= {("embeddings.md", "1_Pooling/config.json")}


def spread(file: str) -> list[str]:
    """`a/{b,c}.py` as a shell takes it."""
    parts = re.split(r"\{([^}]*)\}", file)
    return ["".join(one) for one in product(*(part.split(",") if n % 2 else [part] for n, part in enumerate(parts)))]
