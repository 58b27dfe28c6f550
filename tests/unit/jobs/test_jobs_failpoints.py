"""Failpoints do what their setting says, and a setting that names nothing is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ropeway.errors import ConfigError
from ropeway.jobs.failpoints import armed


def test_an_action_is_taken_at_its_passage() -> None:
    act = armed("result:raise:3,claim:raise")
    act("result")
    act("result")
    with pytest.raises(OSError, match="No space"):
        act("result")
    act("result")
    act("dispatch")
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            act("claim")


@pytest.mark.parametrize("setting", ["nowhere:kill", "claim", "claim:explode", "claim:kill:x", "claim:kill,"])
def test_what_names_nothing_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="ROPEWAY_FAILPOINT"):
        armed(setting)


def test_the_variable_arms_a_process() -> None:
    code = "from ropeway.jobs.failpoints import failpoint; failpoint('dispatch'); failpoint('claim')"
    died = subprocess.run([sys.executable, "-c", code], check=False, env={"ROPEWAY_FAILPOINT": "claim:kill"})
    assert died.returncode == -9
    assert subprocess.run([sys.executable, "-c", code], check=False, env={}).returncode == 0
