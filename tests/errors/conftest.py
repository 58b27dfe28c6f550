"""What the tests of error messages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from aloud import quiet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write what users are told now into mistakes/*.txt")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update", default=False))


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands find no settings of whoever runs the tests."""
    quiet(monkeypatch, tmp_path)
