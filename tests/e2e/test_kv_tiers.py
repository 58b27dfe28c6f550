"""The tiers of KV memory under the bundled model: the same answers with them, and after a kill."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import httpx2
import pytest
from running import Server, serving

from blind import Blind
from invariants import check
from ropeway import LLM, BeamSearchParams
from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams
from ropeway.runtime.local import LocalExecutor
from ropeway.scheduler import FixedTokens, Newest, Resources, Scheduler, make_order

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
DISK_GIB = 0.05


def _config(**options: object) -> EngineConfig:
    return EngineConfig(max_model_len=256, max_num_seqs=8, device="cpu", **options)  # type: ignore[arg-type]


def _scheduler(executor: LocalExecutor, mode: str = "swap") -> Scheduler:
    info = executor.info
    resources = Resources(
        num_blocks=info.num_blocks, block_size=info.block_size, slots=info.max_slots, max_model_len=info.max_model_len,
        max_step_tokens=256, secret=info.secret or b"secret", tiers=tuple(info.tiers),
        preemption_mode=mode,  # type: ignore[arg-type]
    )  # fmt: skip
    return Scheduler(resources, make_order("fcfs"), Newest(), FixedTokens(256), Blind())


def _prompt(number: int) -> list[int]:
    return [(number * 31 + i * 7) % 200 + 5 for i in range(80)]


def _answers(scheduler: Scheduler, executor: LocalExecutor, numbers: Iterable[int]) -> dict[int, list[int]]:
    """Greedy answers to some prompts, all at once."""
    texts: dict[int, list[int]] = {}
    for number in numbers:
        scheduler.add(GenerateRequest(rid=number, tokens=_prompt(number), sampling=GREEDY), 0.0)
        texts[number] = []
    while scheduler.busy:
        plan = scheduler.plan(0.0)
        assert plan is not None
        for event in scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0):
            texts[event.rid] += event.tokens
    check(scheduler)
    return texts


@pytest.fixture(scope="module")
def plain() -> dict[int, list[int]]:
    """What the model says without tiers and without want of memory."""
    executor = LocalExecutor(_config(num_kv_blocks=200))
    texts = _answers(_scheduler(executor), executor, range(6))
    executor.close()
    return texts


@pytest.mark.parametrize("disk", [False, True])
def test_swapped_answers_are_the_same(plain: dict[int, list[int]], tmp_path: Path, disk: bool) -> None:
    below = {"kv_disk_gib": DISK_GIB, "kv_disk_path": str(tmp_path)} if disk else {}
    executor = LocalExecutor(_config(num_kv_blocks=26, kv_host_gib=0.002 if disk else 0.1, **below))
    scheduler = _scheduler(executor)
    for _ in range(2):
        assert _answers(scheduler, executor, range(6)) == plain
    assert scheduler.counters.preemptions > 0
    assert sum(shelf.hits for shelf in scheduler.memory.lower) > 0
    executor.close()


_VICTIM = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_kv_tiers import LocalExecutor, _answers, _config, _scheduler, DISK_GIB
executor = LocalExecutor(_config(num_kv_blocks=24, kv_disk_gib=DISK_GIB, kv_disk_path=sys.argv[1]))
scheduler = _scheduler(executor)
_answers(scheduler, executor, [0])
executor.runner.kv.disk.flush()
print("answered", flush=True)
while True:
    _answers(scheduler, executor, range(1, 6))
"""


def test_a_warm_prompt_survives_a_kill(plain: dict[int, list[int]], tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _VICTIM, str(tmp_path)], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "answered\n"
        time.sleep(0.1)  # it goes on writing: any moment is as good as another
        victim.kill()
    executor = LocalExecutor(_config(num_kv_blocks=24, kv_disk_gib=DISK_GIB, kv_disk_path=str(tmp_path)))
    assert any("are there from before" in note for note in executor.info.notes)
    scheduler = _scheduler(executor)
    assert _answers(scheduler, executor, [0])[0] == plain[0]
    assert scheduler.counters.cache_hits == 64, "all blocks before the one with the last token"
    assert _answers(scheduler, executor, range(1, 6)) == {n: plain[n] for n in range(1, 6)}
    executor.close()


@pytest.mark.parametrize("beams", [False, True])
def test_what_was_computed_last_is_on_the_disk(tmp_path: Path, beams: bool) -> None:
    """Of a program that asks once and ends."""
    prompt = {"prompt_token_ids": list(range(300, 370))}
    for again in (False, True):
        with LLM("bundled", num_kv_blocks=24, kv_disk_gib=DISK_GIB, kv_disk_path=str(tmp_path)) as llm:
            if beams and not again:
                llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=1))
                continue
            (answer,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert answer.num_cached_tokens == 64 * again


def test_damage_is_computed_again_and_another_layout_starts_afresh(plain: dict[int, list[int]], tmp_path: Path) -> None:
    config = _config(num_kv_blocks=24, kv_disk_gib=DISK_GIB, kv_disk_path=str(tmp_path))
    executor = LocalExecutor(config)
    assert _answers(_scheduler(executor), executor, [0])[0] == plain[0]
    executor.close()
    path = tmp_path / "blocks"
    data = bytearray(path.read_bytes()[: 1 << 22])
    for place in range(1 << 16, len(data), 512):
        data[place] ^= 0xFF
    with path.open("r+b") as raw:
        raw.write(data)
    executor = LocalExecutor(config)
    scheduler = _scheduler(executor)
    assert _answers(scheduler, executor, range(3)) == {n: plain[n] for n in range(3)}
    assert scheduler.counters.preemptions > 0
    executor.close()
    executor = LocalExecutor(_config(num_kv_blocks=24, kv_disk_gib=DISK_GIB, kv_disk_path=str(tmp_path), block_size=32))
    assert executor.info.tiers[-1].kept == []
    assert any("was dropped" in note for note in executor.info.notes)
    executor.close()


async def test_a_server_whose_engine_was_killed_is_warm_again(tmp_path: Path) -> None:
    prompt = "The cabin waits for nobody. " * 20
    body = {"model": "bundled", "prompt": prompt, "max_tokens": 12, "temperature": 0}

    async def ask(server: Server) -> tuple[str, int]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
            answer = (await client.post("/v1/completions", json=body)).json()
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    kept = "--kv-disk-gib", str(DISK_GIB), "--kv-disk-path", str(tmp_path)
    with serving(*kept, "--kv-cache-metrics", "--kv-cache-metrics-sample", "1") as server:
        text, cached = await ask(server)
        assert cached == 0
        await server.until(lambda found: found["ropeway_kv_tier_blocks_used"] > 0)
        await ask(server)  # whoever is second in the writer's line has waited for the first
        # An answer's last block is given out first. An engine tells of blocks when it rests, after the answer.
        await server.until(lambda found: found["vllm:kv_block_lifetime_seconds_count"] > 0)
        server.engine.kill()
        await server.until_status("/readyz", 503)
        await server.until_status("/readyz", 200)
        again, cached = await ask(server)
        assert again == text
        assert cached >= 64
        found = await server.metrics()
        assert found["ropeway_kv_tier_hits_total"] > 0
        assert found["vllm:kv_block_lifetime_seconds_count"] > 0, "what it told outlives it"
