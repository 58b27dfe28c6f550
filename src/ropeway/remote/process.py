"""The inside of an engine process: whatever executor it has, served over the socket on file descriptor 0."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import msgspec

from ropeway.config import EngineConfig
from ropeway.contract import ErrorInfo, Stopped
from ropeway.contract.executor import Executor
from ropeway.errors import EngineError, RopewayError
from ropeway.recorder.recorder import make_engine
from ropeway.remote.socket_channel import SocketChannel
from ropeway.scene.watcher import Watcher

_PR_SET_PDEATHSIG = 1


def serve_fd0(make_executor: Callable[[EngineConfig], Executor]) -> int:
    """Read the configuration, build the executor, serve until the service hangs up. Returns the exit code.

    Any failure is sent to the service as the engine's last words before the process ends.
    """
    _die_with_parent()
    faulthandler.enable()
    sock = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    channel = SocketChannel(sock)
    try:
        config = msgspec.json.decode(_read_line(sock), type=EngineConfig)
        watcher = Watcher(make_executor(config), sample=config.kv_cache_metrics_sample * config.kv_cache_metrics)
        engine = make_engine(watcher, config)
        try:
            watcher.run(engine, channel)
        finally:
            engine.close()
    except RopewayError as error:
        channel.send(Stopped(ErrorInfo.of(error)))
        return 1
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        words = EngineError(f"The engine failed with {type(error).__name__}: {error}. The log has the traceback.")
        channel.send(Stopped(ErrorInfo.of(words)))
        return 1
    finally:
        channel.close()
    return 0


def _read_line(sock: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = sock.recv(1)  # one by one, so that no command is swallowed
        if not byte:
            raise EngineError("The service hung up before it sent a configuration.")
        line += byte
    return bytes(line)


def _die_with_parent() -> None:
    """Never outlive the service: the kernel kills this process when its parent dies, even in the middle of a step.
    Signals for the terminal's group are the service's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
