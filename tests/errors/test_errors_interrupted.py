"""Ctrl-C before a server serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from waiting import until


def test_ctrl_c_while_a_model_is_read_ends_at_once(tmp_path: Path) -> None:
    """Reading config.json takes for ever here, as a download may; neither process waits for it."""
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "config.json")
    command = [sys.executable, "-m", "ropeway", "serve", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            # Whoever opens it for writing waits until somebody reads: the server, or its engine.
            with (model / "config.json").open("wb"):
                engines = until(lambda: psutil.Process(server.pid).children(recursive=True))
                server.send_signal(signal.SIGINT)
                said, _ = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 130
    assert "Traceback" not in said
    assert not psutil.wait_procs(engines, 5)[1]
