"""What is built for others: the sources make the same wheel as the tree, and it holds the package and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from ropeway import __version__
from ropeway.cli.main import main

build = pytest.importorskip("hatchling.build", reason="hatchling is in the extra for development")

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

_OFFLINE = """
import ropeway
llm = ropeway.LLM("bundled", max_model_len=256, num_kv_blocks=64)
(output,) = llm.generate(["Once upon a time"], ropeway.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
print(ropeway.__file__, len(output.outputs[0].token_ids))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with contextlib.chdir(ROOT):
        name = build.build_sdist(str(folder))
    with tarfile.open(folder / name) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, which is Debian's, has none
        archive.extractall(folder)
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel that is built from the source distribution."""
    with contextlib.chdir(sources):
        name = build.build_wheel(str(sources.parent))
    with zipfile.ZipFile(sources.parent / name) as archive:
        yield archive


def files(package: Path) -> set[str]:
    """What of the package belongs to it: not what running it has left there."""
    found = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(package.parent).as_posix() for path in found}


def test_the_wheel_is_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    folder = f"ropeway-{__version__}.dist-info"
    described = {name for name in wheel.namelist() if name.startswith(f"{folder}/")}
    assert set(wheel.namelist()) - described == files(ROOT / "src" / "ropeway")
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    assert described == {f"{folder}/{name}" for name in about}


def test_the_source_distribution_has_no_tests_and_no_documentation(sources: Path) -> None:
    assert {path.name for path in sources.iterdir()} == {
        ".gitignore", "CHANGELOG.md", "LICENSE", "NOTICE", "PKG-INFO", "README.md", "SECURITY.md",
        "constraints.txt", "pyproject.toml", "src",
    }  # fmt: skip
    assert files(sources / "src" / "ropeway") == files(ROOT / "src" / "ropeway")


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    about = message_from_string(wheel.read(f"ropeway-{__version__}.dist-info/METADATA").decode())
    assert (about["Name"], about["Version"]) == ("ropeway", __version__)
    assert (about["Requires-Python"], about["License-Expression"]) == (">=3.11", "Apache-2.0")
    assert "Tag: py3-none-any" in wheel.read(f"ropeway-{__version__}.dist-info/WHEEL").decode()
    assert "ropeway = ropeway.cli.main:main" in wheel.read(f"ropeway-{__version__}.dist-info/entry_points.txt").decode()


def test_the_command_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"{__version__}\n"


def test_what_is_needed_is_in_the_constraints() -> None:
    """Each package that is named has one version that was tested, and that version is new enough."""
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    tested = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in lines}
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [*PROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    for needed in map(Requirement, named):
        if needed.name in ("ropeway", "triton"):  # torch says which Triton belongs to it
            continue
        (exactly,) = tested[needed.name.lower().replace("_", "-")].specifier
        assert exactly.operator == "=="
        assert needed.specifier.contains(exactly.version, prereleases=True), f"{needed}: {exactly} was tested"
        assert "+" not in exactly.version, f"{needed.name}: whose build it is, is the index's business"


def test_the_wheel_works_where_there_is_no_compiler(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Slower, and says so once."""
    wheel.extractall(tmp_path / "site")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ROPEWAY_") and k != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE],
        env={**kept, "PATH": "", "PYTHONPATH": str(tmp_path / "site"), "ROPEWAY_CACHE_DIR": str(tmp_path / "cache")},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site" / "ropeway" / "__init__.py"), "8"]
    assert done.stderr.count("there is no C++ compiler") == 1, done.stderr
