"""`python -m ropeway.cli.engine`: the engine process, put together. Started by the host, never by hand."""

from __future__ import annotations

import sys

from ropeway.config import EngineConfig
from ropeway.contract.executor import Executor
from ropeway.remote.process import serve_fd0

COMMAND = (sys.executable, "-m", "ropeway.cli.engine")
"""How the host starts it."""


def make_executor(config: EngineConfig) -> Executor:
    from ropeway.runtime.open import open_executor

    return open_executor(config)  # torch loads there, in this process alone


if __name__ == "__main__":
    sys.exit(serve_fd0(make_executor))
