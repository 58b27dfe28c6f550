"""Recorded traffic: who came when, and how much was asked and answered.

Three formats of lines are read, told apart by their content:

- CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM inference traces).
- JSON lines with timestamp (ms), input_length, output_length and hash_ids, which name blocks of 512 tokens: equal ids
  are equal content, so that prompts share beginnings (Mooncake, FAST 2025).
- JSON lines with at (s), prompt_tokens, output_tokens and, if wanted, tenant, priority, deadline_s,
  ttft_deadline_s and prefix, a list of [name, tokens] pairs of which equal beginnings are shared.

The flight recorder's journal is a trace, too: its requests, but those refused at the door, come again with their
prompts and the lengths of their answers, whatever ended them.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ropeway.contract import Urgency
from ropeway.errors import ConfigError
from ropeway.recorder.journal import SUFFIX
from ropeway.sim.tape import requests
from ropeway.sim.workload import Arrival, alone, answer_of

MOONCAKE_BLOCK = 512
"""Tokens that one of a Mooncake trace's hash ids stands for."""


def read_trace(path: Path, most: int | None = None) -> list[Arrival]:
    """The first `most` requests in `path`, in order of time and beginning at 0. Raises ConfigError."""
    if path.is_dir() or path.suffix == SUFFIX:
        return _from_zero(list(itertools.islice(_recorded(path), most)), path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = _reader_of(first, path)
            arrivals: list[Arrival] = []
            for number, arrival in enumerate(_lines(reader, file, path)):
                if most is not None and number >= most:
                    break
                arrivals.append(arrival)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The trace {path} cannot be read: {error}. Check --trace.", param="trace") from None
    arrivals.sort(key=lambda a: a.at)
    return _from_zero(arrivals, path)


def _from_zero(arrivals: list[Arrival], path: Path) -> list[Arrival]:
    if not arrivals:
        raise ConfigError(f"The trace {path} holds no requests. Check --trace.", param="trace")
    begin = arrivals[0].at
    return arrivals if begin == 0 else [dataclasses.replace(a, at=a.at - begin) for a in arrivals]


Reader = Callable[[Iterator[str]], Iterator[Arrival]]


def _lines(reader: Reader, file: Iterator[str], path: Path) -> Iterator[Arrival]:
    """What `reader` finds, with the place of whatever is wrong."""
    number = 0

    def counted() -> Iterator[str]:
        nonlocal number
        for line in file:
            number += 1
            if line.strip():
                yield line

    try:
        for arrival in reader(counted()):
            if arrival.prompt_len < 1 or arrival.output_len < 1:
                continue  # failed requests of the recorded service: nothing was asked of a model, or nothing came
            yield arrival
    except (ValueError, KeyError, TypeError, IndexError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path}, line {number}: {what}.", param="trace") from None


def _reader_of(first: str, path: Path) -> Reader:
    if "ContextTokens" in first and "GeneratedTokens" in first:
        return _azure
    try:
        record = json.loads(first)
    except ValueError:
        record = None
    if isinstance(record, dict) and "hash_ids" in record:
        return _mooncake
    if isinstance(record, dict) and "prompt_tokens" in record:
        return _own
    raise ConfigError(
        f"{path} is no trace that can be read. Its first line must be the names of columns with ContextTokens and "
        "GeneratedTokens, or a JSON object with hash_ids or prompt_tokens.",
        param="trace",
    )


def _azure(lines: Iterator[str]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines)):
        at = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
        yield alone(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), number)


def _mooncake(lines: Iterator[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines):
        record: dict[str, Any] = json.loads(line)
        left, prompt = int(record["input_length"]), []
        for name in record["hash_ids"]:
            prompt.append((int(name), min(MOONCAKE_BLOCK, left)))
            left -= prompt[-1][1]
        if left > 0:
            raise ValueError(f"{len(prompt)} hash_ids name fewer tokens than the input_length has")
        yield Arrival(record["timestamp"] / 1000, tuple(prompt), int(record["output_length"]), answer_of(number))


def _own(lines: Iterator[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines):
        record: dict[str, Any] = json.loads(line)
        arrival = alone(float(record["at"]), int(record["prompt_tokens"]), int(record["output_tokens"]), number)
        prefix = tuple((int(name), int(count)) for name, count in record.get("prefix", []))
        rest = arrival.prompt_len - sum(count for _, count in prefix)
        if rest < 0:
            raise ValueError(f"the prefix has {-rest} tokens more than the prompt")
        yield Arrival(
            arrival.at,
            (*prefix, (arrival.prompt[0][0], rest)) if rest else prefix,
            arrival.output_len,
            arrival.answer,
            tenant=str(record.get("tenant", "")),
            priority=int(record.get("priority", 0)),
            deadline_s=_seconds(record, "deadline_s"),
            ttft_deadline_s=_seconds(record, "ttft_deadline_s"),
            urgency=Urgency[str(record.get("urgency", "high")).upper()],
        )


def _seconds(record: dict[str, Any], name: str) -> float | None:
    return None if record.get(name) is None else float(record[name])


def _recorded(path: Path) -> Iterator[Arrival]:
    """The requests of a journal. One that got no token counts with the length it asked for."""
    for number, one in enumerate(requests(path)):
        request = one.request
        prompt = tuple((token, len(list(run))) for token, run in itertools.groupby(request.tokens))
        yield Arrival(
            one.at, prompt, one.output_len or request.sampling.max_tokens, answer_of(number), request.tenant,
            request.priority, request.deadline_s, request.ttft_deadline_s, urgency=request.urgency,
        )  # fmt: skip
