"""Settings arrive where others test what they do: at the scheduler, the engine's host, the text service, the jobs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ropeway.accounts import Accounts
from ropeway.config import EngineConfig, ServerConfig
from ropeway.config.jobs import JobsConfig
from ropeway.contract import ExecutorInfo
from ropeway.engine.engine import make_scheduler
from ropeway.errors import ConfigError
from ropeway.gateway import local
from ropeway.gateway.local import LocalModel
from ropeway.jobs import running
from ropeway.jobs.running import Jobs
from ropeway.observe.metrics import Metrics
from ropeway.scheduler import Scheduler
from ropeway.scheduler.budget import FixedTokens
from ropeway.service.loader import ModelText
from ropeway.sim import FakeExecutor
from ropeway.text.tokenizer import ByteTokenizer

INFO = ExecutorInfo(
    model="m", device="sim", dtype="none", num_blocks=64, block_size=16, max_slots=512, max_model_len=512, vocab_size=99
)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("max_num_seqs", 3, lambda s: s.resources.slots),
        ("max_num_batched_tokens", 77, lambda s: s.resources.max_step_tokens),
        ("reserved_seats", 2, lambda s: s.resources.reserved_seats),
        ("enable_prefix_caching", False, lambda s: s.resources.prefix_caching),
        ("enable_chunked_prefill", False, lambda s: s.resources.chunked_prefill),
        ("kv_tenant_quota", 0.25, lambda s: s.resources.tenant_quota),
        ("preemption_mode", "recompute", lambda s: s.resources.preemption_mode),
        ("batching", "static", lambda s: "static" if s.resources.static_batching else "continuous"),
        ("background_gap_ms", 40.0, lambda s: s.resources.background_gap and s.resources.background_gap * 1000),
        ("step_budget_ms", 0.0, lambda s: 0.0 if isinstance(s.budget, FixedTokens) else None),
        ("scheduling_policy", "fair", lambda s: s.waiting.order.name),
        ("promote_after", 3.0, lambda s: s.waiting.order.rules.promote_after),
        ("age_cap", 4.0, lambda s: s.waiting.order.rules.age_cap),
        ("fair_quantum", 5.0, lambda s: s.waiting.order.rules.quantum),
        ("promote_medium_after", 6.0, lambda s: s.waiting.order.rules.patience[1]),
        ("promote_low_after", 7.0, lambda s: s.waiting.order.rules.patience[2]),
    ],
)
def test_the_scheduler_is_what_its_settings_say(name: str, value: Any, found: Callable[[Scheduler], Any]) -> None:
    plain = EngineConfig(scheduling_policy="fcfs")
    changed = dataclasses.replace(plain, **{name: value})
    assert found(make_scheduler(plain, FakeExecutor(INFO), b"s")) == getattr(plain, name) != value
    assert found(make_scheduler(changed, FakeExecutor(INFO), b"s")) == value


async def test_a_model_is_started_as_its_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Host:
        info = None

        def __init__(self, config: EngineConfig, command: object, **more: Any) -> None:
            given.update(more)

        async def start(self) -> None:
            await asyncio.Event().wait()

        async def stop(self, seconds: float) -> None: ...

    def text(model: str, **more: Any) -> ModelText:
        given.update(more)
        return ModelText(name="m", tokenizer=ByteTokenizer(), template=None, eos_ids=(), context_limit=1, generation={})

    def service(host: object, text: ModelText, **more: Any) -> None:
        given.update(more)
        raise ConfigError("that was all")

    for name, stand_in in (("EngineHost", Host), ("load_text", text), ("EngineTextService", service)):
        monkeypatch.setattr(local, name, stand_in)
    engine = EngineConfig(
        model="m", revision="r", download_dir="d", tokenizer="t", model_impl="native", max_model_len=64, seed=5,
        max_logprobs=7, default_priority=-3,
    )  # fmt: skip
    server = ServerConfig(
        served_model_name="cabin", chat_template="c.jinja", tool_call_parser="hermes", reasoning_parser="qwen3",
        max_restarts=2, engine_timeout=9.0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="that was all"):
        await LocalModel.begin(engine, server, ("never", "run"), Metrics("m"))
    assert given == {
        "revision": "r", "download_dir": "d", "tokenizer": "t", "model_impl": "native", "max_model_len": 64, "seed": 5,
        "max_logprobs": 7, "default_priority": -3, "model_name": "cabin", "chat_template": "c.jinja",
        "tool_call_parser": "hermes", "reasoning_parser": "qwen3", "max_restarts": 2, "timeout": 9.0,
    }  # fmt: skip


async def test_jobs_are_kept_and_shared_as_their_settings_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    kept: dict[str, Any] = {}

    class Keeper:
        def __init__(self, store: object, **given: Any) -> None:
            kept.update(given)

        def start(self) -> None: ...

        async def stop(self) -> None: ...

    async def open_queue(url: str, prefix: str, *_: object, **given: Any) -> None:
        opened.set_result({"url": url, "prefix": prefix, **given})
        await asyncio.Event().wait()

    monkeypatch.setattr(running, "Keeper", Keeper)
    monkeypatch.setattr(running, "opened", open_queue)
    config = JobsConfig(
        data_dir=str(tmp_path), max_batch_requests=7, job_retention=2.5, redis_url="redis://127.0.0.1:1/0",
        redis_prefix="cabin", redis_window=9,
    )  # fmt: skip
    accounts = Accounts(config.data_path, None)
    jobs = Jobs(config, accounts)
    jobs.start(None, lambda: 4)  # type: ignore[arg-type]  # nothing is computed
    async with asyncio.timeout(10):
        found = await opened
    assert (found["url"], found["prefix"], found["window"]) == ("redis://127.0.0.1:1/0", "cabin", 9)
    assert (kept["most"], kept["keep_s"]) == (7, 9000.0)
    await jobs.close()
    await accounts.close()
