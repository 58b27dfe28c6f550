"""POST /ui/compare: the same requests through static and continuous batching, simulated in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.parse import decode, ignored_header
from ropeway.api.state import read_body
from ropeway.contract.compare import MAX_TOKENS, Comparison, Mix
from ropeway.errors import EngineError, OverloadedError, RequestError

_log = logging.getLogger(__name__)
_MODULE: Final = "ropeway.sim.compare"
_PATIENCE: Final = 60.0
_MOST_WAITING: Final = 4


class Simulator:
    """Runs one comparison at a time, so that looking at pictures never takes more than one core from the model. A few
    may wait for it."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def compare(self, mix: Mix) -> Comparison:
        """Raises OverloadedError, RequestError if it takes too long, and EngineError."""
        if self._waiting >= _MOST_WAITING:
            message = f"{self._waiting} comparisons are being made or wait for it already. Try again in a moment."
            raise OverloadedError(message, retry_after=2.0)
        self._waiting += 1
        try:
            async with self._turn:
                found = await asyncio.to_thread(_run, msgspec.json.encode(mix))
        finally:
            self._waiting -= 1
        return msgspec.json.decode(found, type=Comparison)


async def compare(request: Request) -> Response:
    """Simulate both ways of batching, and say what became of each request."""
    mix, ignored = decode(Mix, await read_body(request), {})
    tokens = mix.requests * mix.answer_tokens
    if tokens > MAX_TOKENS:
        message = f"{mix.requests} answers of {mix.answer_tokens} tokens are {tokens}; at most {MAX_TOKENS} are taken."
        raise RequestError(message, param="answer_tokens")
    simulator: Simulator = request.app.state.simulator
    found = await simulator.compare(mix)
    response = Response(msgspec.json.encode(found), media_type="application/json")
    response.headers.update(ignored_header(ignored))
    return response


def _run(mix: bytes) -> bytes:
    command = [sys.executable, "-P", "-m", _MODULE]
    try:
        done = subprocess.run(
            command, input=mix, capture_output=True, timeout=_PATIENCE, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise _too_long() from None
    if done.returncode == -signal.SIGXCPU:
        raise _too_long()
    if done.returncode:
        _log.error("a comparison failed with exit code %d: %s", done.returncode, done.stderr.decode()[-2000:])
        raise EngineError(f"The simulation of {mix.decode()} failed with exit code {done.returncode}.")
    return done.stdout


def _too_long() -> RequestError:
    return RequestError("The simulation took too long. Ask for fewer requests or shorter answers.")
