"""The commands against one real server of the bundled model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import Server, ropeway, serving

from ropeway.bench.spawn import serving as spawned
from ropeway.errors import EngineError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--served-model-name", "cabin") as server:
        yield server


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """Run a command; returns exit code, stdout, stderr."""
    done = ropeway(*arguments, **options)
    return done.returncode, done.stdout, done.stderr


def test_banner_says_what_runs_where_and_how_to_ask(server: Server) -> None:
    text = server.log
    for words in (
        "serves cabin (bundled) at",
        "Device:",
        "dtype:",
        "Threads:",
        "Attention:",
        "512 blocks",
        "Start-up:",
    ):
        assert words in text
    page = re.search(r"See it work: (\S+/ui/) ", text)
    assert page is not None
    assert httpx2.get(page[1]).text.startswith("<!doctype html>")
    command = re.search(r"  (curl (?:.*\\\n)+.*)\n", text)
    assert command is not None
    # The line in the banner works as it stands.
    done = subprocess.run(
        ["sh", "-c", command.group(1) + " -s"], capture_output=True, text=True, timeout=60, check=False
    )
    assert '"delta"' in done.stdout
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_chat_and_complete_print_the_answer_alone(server: Server) -> None:
    code, out, err = run("chat", "--url", server.url, "--quick", "Hello!", "--temperature", "0")
    assert (code, err) == (0, "")
    assert len(out.strip()) > 3
    again = run("chat", "--url", server.url, "--temperature", "0", input="Hello!\n/stats\n")
    assert again[1].startswith(out)
    assert "tokens/s" in again[1]
    code, out, err = run("complete", "--url", f"{server.url}/v1/", "--quick", "Once upon a time", "--max-tokens", "8")
    assert (code, err) == (0, "")
    assert out.strip()


def test_bench_serve_measures_a_real_server(server: Server, tmp_path: Path) -> None:
    code, out, err = run(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "6", "--random-input-len", "12",
        "--random-output-len", "5", "--ignore-eos", "--request-rate", "50", "--max-concurrency", "3",
        "--num-warmups", "1", "--backend", "openai-chat", "--save-result", "--save-detailed",
        "--result-dir", str(tmp_path), "--result-filename", "r.json", "--goodput", "ttft:60000",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"^Successful requests: +6 *$", out, re.MULTILINE)
    assert re.search(r"^Total generated tokens: +30 *$", out, re.MULTILINE)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["model_id"], saved["completed"], saved["output_lens"]) == ("cabin", 6, [5] * 6)
    assert saved["request_goodput"] == pytest.approx(saved["request_throughput"])
    assert all(0 < ttft <= latency for ttft, latency in zip(saved["ttfts"], saved["latencies"], strict=True))


def test_bench_says_so_when_nothing_succeeds(server: Server) -> None:
    code, out, err = run("bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--model", "no-such-model")
    assert code == 1
    assert "no-such-model" in err
    assert re.search(r"^Failed requests: +2 *$", out, re.MULTILINE)


def test_port_in_use_and_broken_model_end_with_one_line_and_exit_code_2(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    code, _, err = run("serve", "--port", port)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("RW-CFG: Port")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    code, _, err = run("serve", str(tmp_path), "--port", "0")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("RW-MODEL: ")
    code, _, err = run("serve", "--port", "0", "--num-kv-blocks", "2", "--max-model-len", "512")
    assert code == 2
    assert re.match(r"RW-MEM: .*--num-kv-blocks 32", err.strip().splitlines()[-1])


def test_a_server_to_measure_that_does_not_come_up_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)did not become ready. Its last words: .*RW-MODEL: .*does not exist"):
        spawned(str(tmp_path / "none")).__enter__()


def test_offline_benchmarks(tmp_path: Path) -> None:
    code, out, err = run(
        "bench", "throughput", "--num-prompts", "4", "--random-input-len", "8", "--random-output-len", "4",
        "--num-kv-blocks", "256", "--output-json", str(tmp_path / "t.json"),
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"^Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s$", out, re.M)
    result = json.loads((tmp_path / "t.json").read_text())
    assert (result["num_requests"], result["total_num_tokens"]) == (4, 4 * 12)
    code, out, err = run(
        "bench", "batching", "--lengths", "2,4,8", "--num-prompts", "9", "--max-num-seqs", "3", "--input-len", "4",
        "--num-kv-blocks", "256", "--plot", str(tmp_path / "seats.png"), "--output-json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert code == 0, err
    assert "14 of 24 slot-steps used = 58.3 % occupancy" in out
    assert (tmp_path / "seats.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "b.json").read_text())
    assert runs["queue_static"]["slot_steps_used"] == runs["queue_continuous"]["slot_steps_used"] == 42
    assert runs["queue_continuous"]["occupancy"] > runs["queue_static"]["occupancy"]


def test_interrupt_stops_the_server_cleanly() -> None:
    with serving() as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
