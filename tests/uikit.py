"""A feed for the page that tests can steer: batches that look alive, as fast as they are wanted."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from apiserver import Server, up
from ropeway.config import ServerConfig
from ropeway.service.echo import EchoService

CELLS = 512
URGENCIES = ("high", "high", "medium", "low")


class Batch:
    """An imagined batch of `model`: requests board, read their prompts, write, and leave. The same seed tells the same
    story."""

    def __init__(self, slots: int = 12, seed: int = 1, start: float = 1_800_000_000.0, model: str = "imagined") -> None:
        self.slots = slots
        self.model = model
        self._rng = random.Random(seed)
        self._seats: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._step = 0
        self._start = start

    def engine(self) -> dict[str, Any]:
        return {"model": self.model, "device": "cpu", "slots": self.slots, "block_size": 16, "max_model_len": 2048}

    def frame(self) -> dict[str, Any]:
        """The next moment."""
        self._step += 1
        now = self._start + self._step / 4
        events = []
        for slot, seat in list(self._seats.items()):
            if seat["computed"] < seat["prompt"]:
                seat["count"] = min(64, seat["prompt"] - seat["computed"])
                seat["computed"] += seat["count"]
                continue
            seat["phase"], seat["count"] = "decode", 1
            seat["known"] += self._rng.randint(1, 6)
            seat["computed"] = seat["known"] - 1
            if seat["known"] > seat["end"]:
                how = "preempted" if self._rng.random() < 0.1 else "finished"
                events.append({"id": seat["id"], "event": how, "t": now, "reason": ""})
                del self._seats[slot]
        for slot in range(self.slots):
            if slot not in self._seats and self._rng.random() < 0.3:
                events.append({"id": self._board(slot), "event": "boarded", "t": now, "reason": ""})
        return self._told(now, events)

    def _board(self, slot: int) -> str:
        rng, prompt = self._rng, self._rng.randint(20, 500)
        cached = rng.choice((0, 0, prompt // 2 // 16 * 16))
        self._next += 1
        self._seats[slot] = {
            "slot": slot, "id": f"request-{self._next}", "urgency": rng.choice(URGENCIES), "prompt": prompt,
            "computed": cached, "known": prompt, "cached": cached, "count": 0, "phase": "prefill",
            "blocks": prompt // 16 + 1, "end": prompt + int(rng.lognormvariate(4, 1)) + 2,
        }  # fmt: skip
        return f"request-{self._next}"

    def _told(self, now: float, events: list[dict[str, Any]]) -> dict[str, Any]:
        rng = self._rng
        reading = sum(seat["phase"] == "prefill" for seat in self._seats.values())
        waiting = [
            {"id": f"request-{self._next + n + 1}", "position": n, "urgency": URGENCIES[n % 4], "holder": "slots",
             "reason": f"all {self.slots} seats are taken", "eta_s": 0.5 * n + 0.4}
            for n in range(4 + self._step // 8 % 5)
        ]  # fmt: skip
        cells = bytes(rng.choice((0, 1, 1, 2, 3, 3, 4)) if n % 7 else 0 for n in range(CELLS))
        return {
            "t": now, "step": self._step, "model": self.model,
            "seats": [{k: v for k, v in seat.items() if k != "end"} for seat in self._seats.values()],
            "waiting": waiting, "waiting_total": len(waiting),
            "kv": {"total": 4096, "used": 2100, "cached": 700, "cells": base64.b64encode(cells).decode(),
                   "tiers": [{"name": "host", "blocks": 1000, "used": 320}]},
            "rates": {"prompt_tps": 400.0 * reading + rng.random(), "generation_tps": 55.0 * len(self._seats),
                      "ttft_p50": 0.2 + 0.1 * rng.random(), "ttft_p99": 0.9, "itl_p50": 0.018, "itl_p99": 0.06},
            "events": events,
        }  # fmt: skip


class StubFeed:
    """`/ui/feed` of a test's server: a frame of each of `batches`, again and again."""

    def __init__(self, *batches: Batch, pause: float = 0.05) -> None:
        self.batches = batches
        self.pause = pause
        self.readers = 0

    async def answer(self, request: Request) -> Response:
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        self.readers += 1
        hello = {"version": "0", "engines": [batch.engine() for batch in self.batches], "operator": True}
        try:
            yield b"event: hello\ndata: " + json.dumps(hello).encode() + b"\n\n"
            while True:
                for batch in self.batches:
                    yield b"data: " + json.dumps(batch.frame()).encode() + b"\n\n"
                await asyncio.sleep(self.pause)
        finally:
            self.readers -= 1


@contextmanager
def showing(feed: StubFeed, **settings: Any) -> Iterator[Server]:
    """A server without a model, whose page is told of `feed`."""
    settings = {"port": 0, "shutdown_timeout": 0.0, **settings}
    server = Server(EchoService(delay=0.01), ServerConfig(**settings))
    server.app.router.routes.insert(0, Route("/ui/feed", feed.answer))
    with up(server):
        yield server
