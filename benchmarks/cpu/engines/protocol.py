"""What the conductor and an engine's runner say to each other; standard library only, any engine's Python runs it.

A runner is started as `python run_X.py JSON` with a `Start`. It loads the model, makes one token, and prints one line
`{"version": ...}`. From then on each line on its standard input is a `Job`, answered with one line: the seconds that
passed and how many tokens each request got. What engines themselves print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """Greedy, exactly `max_tokens` long whatever the model would like to end with."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Job:
    """Requests that are put in all at once. `shared` tokens at the beginning of every prompt are equal."""

    requests: list[Request]
    shared: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Job:
        fields = json.loads(line)
        return cls([Request(**request) for request in fields["requests"]], fields["shared"])


@dataclass(frozen=True)
class Start:
    """`settings` are the engine's own, named as the engine names them."""

    model: str
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        return json.dumps(asdict(self))


Generate = Callable[[Job], list[int]]
"""Run a job to its end; how many tokens each request got, in order."""


def serve(load: Callable[[Start], tuple[str, Generate]]) -> None:
    """Be a runner: `load` gives the engine's version and its `Generate`."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    version, generate = load(Start(**json.loads(sys.argv[1])))
    generate(Job([Request([7, 8, 9, 10], 1)]))
    say(version=version)
    for line in sys.stdin:
        job = Job.decode(line)
        begun = time.perf_counter()
        counts = generate(job)
        say(seconds=time.perf_counter() - begun, output_tokens=counts)
