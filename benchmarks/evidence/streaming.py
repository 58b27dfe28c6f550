"""What a client sees of a real server: streams, whole answers, and batches."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
from chapter import Chapter, ms
from experiments import Scale
from loop import ROUNDS, by_turns, percentile

from ropeway.bench.spawn import serving

_PROMPT = "Tell a story about number {}."


@dataclass
class Answer:
    first: float
    whole: float


def middle(answers: Sequence[Answer], part: str) -> float:
    return percentile([getattr(answer, part) for answer in answers], 50)


async def ask(client: httpx2.AsyncClient, number: int, tokens: int, *, stream: bool) -> Answer:
    """When the first text and when the last of it was there, in seconds."""
    body = {
        "prompt": _PROMPT.format(number),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    begun, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for piece in response.aiter_bytes():
            if not first and b'"text":"' in piece.replace(b'"text": "', b'"text":"'):
                first = time.perf_counter() - begun
    return Answer(first, time.perf_counter() - begun)


async def together(url: str, count: int, tokens: int, *, stream: bool, most: int) -> tuple[list[Answer], float]:
    """`count` requests, `most` at a time; their answers, and the seconds that all took."""
    async with httpx2.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
        gate = asyncio.Semaphore(most)

        async def one(number: int) -> Answer:
            async with gate:
                return await ask(client, number, tokens, stream=stream)

        begun = time.perf_counter()
        answers = await asyncio.gather(*(one(number) for number in range(count)))
        return list(answers), time.perf_counter() - begun


def batch(url: str, count: int, tokens: int) -> float:
    """Seconds from the upload of a file of requests until its batch has ended."""
    lines = []
    for number in range(count):
        body = {
            "model": None,
            "prompt": _PROMPT.format(number),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for line in lines:
            line["body"]["model"] = model  # type: ignore[index]
        data = "\n".join(map(json.dumps, lines)).encode()
        begun = time.perf_counter()
        file = client.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"}).json()
        wanted = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        found = client.post("/v1/batches", json=wanted).json()
        while found["status"] not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(0.05)
            found = client.get(f"/v1/batches/{found['id']}").json()
        assert (found["status"], found["request_counts"]["completed"]) == ("completed", count), found
        return time.perf_counter() - begun


def streaming(model: str, scale: Scale, chapter: Chapter, data: str) -> None:
    """Streams, whole answers, many at a time, batches: latency as a person sees it, and throughput."""
    tokens, count = 4 * scale.unit, scale.count // 2
    with serving(model, ["--data-dir", data, "--max-num-seqs", str(scale.seats)]) as url:

        def run(count: int, most: int, *, stream: bool) -> tuple[list[Answer], float]:
            return asyncio.run(together(url, count, tokens, stream=stream, most=most))

        run(4, 4, stream=True)
        alone, many = [], []
        for order in by_turns(True, False):
            alone.append({stream: run(8, 1, stream=stream)[0] for stream in order})
            many.append({stream: run(count, scale.seats // 2, stream=stream)[1] for stream in order})
        _, one_by_one = run(max(8, count // 4), 1, stream=False)
        filed = batch(url, count, tokens)
    rows = []
    for name, stream in (("stream", True), ("whole answer", False)):
        answers = [answer for one in alone for answer in one[stream]]
        rows.append((name, ms(middle(answers, "first")), ms(middle(answers, "whole"))))
    chapter.say(f"One request at a time, {tokens} tokens out, over HTTP on this machine, in {ROUNDS} rounds in turn:")
    chapter.table(("", "something to read after", "all of it after"), rows)
    chapter.keep("first_of_whole", [middle(one[True], "first") / middle(one[False], "whole") for one in alone])
    took = chapter.keep("stream_time", [middle(one[True], "whole") / middle(one[False], "whole") for one in alone])
    chapter.say(f"A stream takes {took} times as long as a whole answer.")
    most = scale.seats // 2
    pace = max(8, count // 4) / one_by_one
    rates = {
        "one request after the other": pace,
        f"{most} at a time, whole": count / percentile([one[False] for one in many], 50),
        f"{most} at a time, streamed": count / percentile([one[True] for one in many], 50),
        "as a batch (/v1/batches)": count / filed,
    }
    streamed = chapter.keep("stream_rate", [one[False] / one[True] for one in many])
    chapter.say(f"{count} requests of the same kind:")
    chapter.table(
        ("way", "requests a minute", "of one after the other"),
        [(name, f"{60 * rate:,.0f}", f"{rate / pace:.1f} x") for name, rate in rates.items()],
    )
    chapter.say(f"Streamed, {most} at a time go {streamed} times as fast as whole.")
    chapter.figures |= {"async_gain": rates[f"{most} at a time, whole"] / pace, "batch_api_gain": count / filed / pace}
