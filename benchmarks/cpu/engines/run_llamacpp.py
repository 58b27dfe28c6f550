"""llama.cpp through its own server, asked over HTTP without streaming, so that the client costs next to nothing.

Settings: `binary` (llama-server) and `flags`, a list.
"""

import atexit
import http.client
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from protocol import Generate, Request, Start, serve

PATIENCE = 300.0
"""Seconds that the server gets to come up."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ask(port: int, method: str, path: str, body: str | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ConnectionError(f"llama-server answered {response.status}: {answer[:300]!r}")
    return answer


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            _ask(port, "GET", "/health")
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"llama-server did not come up (exit status {server.poll()}).") from None
            time.sleep(0.05)


def load(start: Start) -> tuple[str, Generate]:
    binary, port, threads = start.settings["binary"], _free_port(), str(start.threads)
    place = ["--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads]
    server = subprocess.Popen([binary, "-m", start.model, *place, *start.settings["flags"]], stdout=sys.stderr)
    atexit.register(server.terminate)
    _wait(server, port)
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    version = (told.stderr + told.stdout).partition("version:")[2].partition("\n")[0].strip()
    pool = ThreadPoolExecutor(128)

    def one(request: Request) -> int:
        body = {"prompt": request.prompt, "n_predict": request.max_tokens, "temperature": 0, "ignore_eos": True}
        return int(json.loads(_ask(port, "POST", "/completion", json.dumps(body)))["tokens_predicted"])

    return version, lambda job: list(pool.map(one, job.requests))


if __name__ == "__main__":
    serve(load)
