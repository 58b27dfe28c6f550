"""What tests of several directories share."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No example is judged by how long it takes, to run or to make: a busy machine makes any of them slow. The suite has the
# same examples each time, so that whoever sees it red knows whose change that is; `make explore` draws others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=1000)
settings.register_profile("ropeway", settings.get_profile("explore"), derandomize=True, max_examples=100)
settings.load_profile("ropeway")

if not Path("/dev/nvidiactl").exists():
    # Triton decides at its first import, whoever imports it, whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def no_data_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that name no data directory neither see the keys and jobs of whoever runs the tests nor leave any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that a test runs in its own process sends logs to a stream that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("ropeway", "uvicorn")]
    before = [(list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def equally_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By a clock that finds all products alike the preferred one serves, however busy the machine is."""
    from ropeway.runtime.layers import linear

    monkeypatch.setattr(linear, "_timed", lambda product, x: 1.0)
    linear.choose.cache_clear()
    yield
    linear.choose.cache_clear()


def each_once(save: Callable[[str, Path], Path], folders: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by their kinds, each made when it is first wanted."""
    return functools.cache(lambda kind: save(kind, folders.mktemp(kind)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random checkpoint by the name of its kind in `checkpoints.KINDS`, made once a session."""
    from checkpoints import save

    return each_once(save, tmp_path_factory)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random encoder by the name of its kind in `encoder_checkpoints.ENCODERS`, made once a session."""
    from encoder_checkpoints import save_encoder

    return each_once(save_encoder, tmp_path_factory)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random checkpoint with experts by its kind in `expert_checkpoints.EXPERTS`, made once a session."""
    from expert_checkpoints import save_experts

    return each_once(save_experts, tmp_path_factory)
