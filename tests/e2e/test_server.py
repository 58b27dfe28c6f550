"""A real server with the bundled model, under real clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import httpx2
import openai
import psutil
import pytest
from running import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
async def model(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


async def test_it_answers_a_question_and_ends_by_itself(client: openai.AsyncOpenAI, model: str) -> None:
    question = ask("What is continuous batching?")
    answer = await client.chat.completions.create(model=model, messages=question, temperature=0)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "batch" in (choice.message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_and_whole_answers_are_equal(client: openai.AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": ask("Tell me a story about a fox."), "max_tokens": 80, "seed": 5}
    whole = await client.chat.completions.create(**asked, temperature=0.9)
    pieces, usage = [], None
    async for chunk in await client.chat.completions.create(
        **asked, temperature=0.9, stream=True, stream_options={"include_usage": True}
    ):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 5
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_a_seeded_answer_does_not_depend_on_its_neighbours(client: openai.AsyncOpenAI, model: str) -> None:
    async def one(seed: int) -> str:
        answer = await client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=40, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    alone = [await one(seed) for seed in range(4)]
    together = await asyncio.gather(*(one(seed % 4) for seed in range(24)))
    assert list(together) == [alone[seed % 4] for seed in range(24)]


async def test_sixty_four_streams_at_once(client: openai.AsyncOpenAI, model: str, server: Server) -> None:
    async def stream(number: int) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(
            model=model,
            messages=ask(f"Count from {number % 7} to {number % 7 + 5}."),
            max_tokens=60,
            temperature=0,
            stream=True,
        ):
            text += chunk.choices[0].delta.content or ""
        return text

    answers = await asyncio.gather(*(stream(number) for number in range(64)))
    assert all(answers[number] == answers[number % 7] for number in range(64))
    assert all(answers)
    assert (await server.until_idle())["vllm:kv_cache_usage_perc"] == 0


async def test_stop_strings_hold_across_tokens(client: openai.AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": ask("Count from 1 to 9."), "max_tokens": 60, "temperature": 0}
    whole = (await client.chat.completions.create(**asked)).choices[0].message.content or ""
    for stop in (whole[8:11], whole[5:12], whole[-3:]):
        expected = whole[: whole.index(stop)]
        cut = await client.chat.completions.create(**asked, stop=[stop])
        assert cut.choices[0].message.content == expected
        assert cut.choices[0].finish_reason == "stop"
        streamed = ""
        async for chunk in await client.chat.completions.create(**asked, stop=[stop], stream=True):
            streamed += chunk.choices[0].delta.content or ""
        assert streamed == expected


async def test_characters_of_many_tokens_arrive_whole(client: openai.AsyncOpenAI, model: str, server: Server) -> None:
    """Force the bytes of an emoji one token after the other: no delta may hold half of it."""
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
        tokens = (await http.post("/tokenize", json={"prompt": "🚡", "add_special_tokens": False})).json()["tokens"]
        assert len(tokens) > 1, "the emoji is meant to be several tokens"
        # The model is made to say any of its tokens; whole emoji and broken ones both come out.
        async with http.stream(
            "POST", "/v1/completions",
            json={"prompt": "🚡🚡🚡", "max_tokens": 60, "temperature": 1.0, "seed": 1, "stream": True,
                  "logit_bias": {str(token): 100 for token in tokens}, "ignore_eos": True, "return_token_ids": True},
        ) as response:  # fmt: skip
            lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
        pieces = [json.loads(line[6:])["choices"][0] for line in lines]
        said = [token for piece in pieces for token in piece.get("token_ids", [])]
        at_once = (await http.post("/detokenize", json={"tokens": said})).json()["prompt"]
    assert len(said) == 60
    assert "".join(piece["text"] for piece in pieces) == at_once


async def test_five_hundred_disconnects_leave_no_block_behind(server: Server, model: str) -> None:
    before = await server.until_idle()

    async def leave_early(http: httpx2.AsyncClient, number: int) -> None:
        body = {"model": model, "prompt": f"Story {number}: once", "max_tokens": 400, "stream": number % 5 > 0,
                "ignore_eos": True}  # fmt: skip
        try:
            async with asyncio.timeout(0.2 if number % 5 == 0 else 20):
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    seen = 0
                    async for _ in response.aiter_lines():
                        seen += 1
                        if seen > number % 9:
                            return
        except TimeoutError:
            return

    for batch in range(10):
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            await asyncio.gather(*(leave_early(http, batch * 50 + number) for number in range(50)))
    after = await server.until_idle()
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 500 * 100


async def test_a_client_that_leaves_frees_its_seat(server: Server, model: str) -> None:
    before = await server.until_idle()
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
        body = {"model": model, "prompt": "once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()  # kept: a dropped iterator would end the stream
            await anext(lines)
            await server.until(lambda m: m["vllm:num_requests_running"] == 1)
    after = await server.until_idle()
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 1500


async def test_an_idle_server_uses_no_cpu(server: Server) -> None:
    await server.until_idle()
    processes = [psutil.Process(server.process.pid), server.engine]

    def used() -> list[tuple[float, int]]:
        return [
            (sum(process.cpu_times()[:2]), process.num_ctx_switches().voluntary) for process in processes
        ]  # fmt: skip

    for _ in range(5):  # what the last test has left may still be freed at first
        before = used()
        await asyncio.sleep(2.0)
        spent = [(cpu - cpu0, turns - turns0) for (cpu0, turns0), (cpu, turns) in zip(before, used(), strict=True)]
        if all(cpu <= 0.02 and turns <= 10 for cpu, turns in spent):
            return
    raise AssertionError(f"an idle server takes (seconds, switches) {spent} in 2 s")
