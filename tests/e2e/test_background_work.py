"""Background work on a real server: it fills the seats, gives one up at once, and says the same all the same."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx2
from running import SMALL, serving

from native import GREEDY_DTYPE

LOW = {"x-ropeway-priority": "low"}


async def complete(client: httpx2.AsyncClient, prompt: str, tokens: int, headers: dict[str, str]) -> tuple[str, float]:
    """The text, and when it had come."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], time.monotonic()


async def test_a_person_gets_a_seat_that_background_work_had_and_no_text_changes() -> None:
    prompts = [f"number {number} of the story begins with" for number in range(5)]
    with serving(*SMALL, "--dtype", GREEDY_DTYPE, "--max-num-seqs", "2", "--background-gap-ms", "0") as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            alone = [(await complete(client, prompt, 1200, {}))[0] for prompt in prompts]
            work = [asyncio.create_task(complete(client, prompt, 1200, LOW)) for prompt in prompts]
            await server.until(lambda m: m["vllm:num_requests_running"] == 2 and m["vllm:num_requests_waiting"] == 3)
            lines = (await client.get("/metrics")).text.splitlines()
            (low,) = [line for line in lines if line.startswith("ropeway_requests_running{") and '"low"' in line]
            assert low.endswith(" 2.0")
            _, served = await complete(client, "somebody asks", 5, {})
            found = [await task for task in work]
            assert sum(ended > served for _, ended in found) >= 4, "a person waited for background work"
            assert [text for text, _ in found] == alone
        after = await server.until_idle()
        assert after["vllm:num_preemptions_total"] == 1
