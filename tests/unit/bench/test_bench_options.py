"""`ropeway bench serve` as it is typed, against a server that listens to what it is sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, running

from ropeway.bench.config import DatasetConfig, LoadConfig
from ropeway.bench.datasets import Sample, Words
from ropeway.bench.serve import bench_serve
from ropeway.cli import bench_serve as bench_serve_command
from ropeway.cli.main import main
from ropeway.errors import ConfigError


async def test_what_is_typed_is_sent_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(FakeServer()) as server:
        words = ["bench", "serve", "--host", "127.0.0.1", "--port", server.url.rsplit(":", 1)[1], "--num-prompts", "2"]
        words += ["--endpoint", "/v1/completions", "--header", "x-test=yes", "--random-input-len", "3"]
        words += ["--random-output-len", "4", "--percentile-metrics", "itl", "--metric-percentiles", "50"]
        words += ["--request-rate", "100", "--burstiness", "0.5", "--label", "mine", "--extra-body", '{"top_k": 3}']
        words += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json", "--model", "m"]
        with pytest.raises(SystemExit) as end:
            await asyncio.to_thread(main, words)
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "P50 ITL (ms)" in shown
    assert "TTFT" not in shown
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["label"], saved["burstiness"], saved["request_rate"]) == ("mine", 0.5, 100.0)
    assert [body["top_k"] for body in server.requests] == [3, 3]
    assert "x-test: yes" in server.headers[-1]


class Late(FakeServer):
    """Is not there for its first two answers."""

    refusals = 2

    def answer(self, writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
        self.refusals -= 1
        super().answer(writer, 503 if self.refusals >= 0 else status, fields)


async def test_a_server_that_comes_up_is_waited_for_as_long_as_told() -> None:
    samples = [Sample("a b", 2, 2)]
    async with running(Late()) as server:
        with pytest.raises(ConfigError, match="HTTP 503"):
            await bench_serve(LoadConfig(base_url=server.url), samples)
        found = await bench_serve(LoadConfig(base_url=server.url, ready_check_timeout_sec=20), samples)
    assert found.metrics.completed == 1


def test_answers_of_a_dataset_may_have_another_length(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    talk = [{"from": "human", "value": "a b c d e"}, {"from": "gpt", "value": "f g h i"}]
    path.write_text(json.dumps([{"conversations": talk}]))
    config = DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=1, sharegpt_output_len=9)
    assert config.samples(Words()) == [Sample("a b c d e", 5, 9)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--header", "x-test"), "--header is 'x-test'; it must be NAME=VALUE"),
        (("--percentile-metrics", "ttft,speed"), "unknown 'speed'"),
        (("--random-range-ratio", "1"), "random-range-ratio is 1.0; it must be"),
        (("--dataset-name", "prefix_repetition", "--num-prompts", "2"), "num-prefixes is 10; it must be from 1 to 2"),
        (("--tokenizer", "/no/such/tokenizer.json"), "cannot be loaded"),
    ],
)
def test_what_means_nothing_is_refused_before_the_server_is_asked(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "--port", "9", *words])
    assert (end.value.code, said in capsys.readouterr().err) == (2, True)


async def test_a_load_generator_that_is_late_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_serve_command, "LATE", 0.0)
    async with running(FakeServer()) as server:
        words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-input-len", "3"]
        with pytest.raises(SystemExit):
            await asyncio.to_thread(main, [*words, "--random-output-len", "1"])
    assert "behind its schedule" in capsys.readouterr().err
