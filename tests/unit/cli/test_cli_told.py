"""What commands make of options that no other test gives: what they send, ask for, or hand on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ropeway.cli import bench_batching, bench_throughput, canary, run_calibrate, run_file
from ropeway.cli.client import Client
from ropeway.cli.main import main
from ropeway.errors import ConfigError

Sent = list[tuple[Any, ...]]
BATCH = {
    "id": "batch_1", "status": "completed", "endpoint": "/v1/embeddings", "output_file_id": None, "error_file_id": None,
    "request_counts": {"total": 1, "completed": 1, "failed": 0},
}  # fmt: skip


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """All that is sent to a server, which knows one model, one batch and no request."""
    told: Sent = []

    def stream(self: Client, path: str, fields: dict[str, Any], timing: object) -> Generator[str, None, None]:
        told.append((path, self.model, fields))
        yield "fine"

    def call(self: Client, method: str, path: str, body: Any = None) -> Any:
        told.append((method, path, body))
        return dict(BATCH) if "batch" in path and "?" not in path else {"data": [], "has_more": False}

    def upload(self: Client, path: str, name: str, file: BinaryIO, fields: dict[str, str]) -> Any:
        told.append((path, name, file.read(), fields))
        return {"id": "file_1"}

    def follow(self: Client, path: str) -> Generator[Any, None, None]:
        told.append((path,))
        yield from ()

    for function in (stream, call, upload, follow):
        monkeypatch.setattr(Client, function.__name__, function)
    return told


def test_a_conversation_is_asked_for_as_told(sent: Sent) -> None:
    common = ("--model", "m", "--temperature", "0.5", "--max-tokens", "7", "--quick", "Hi")
    run("chat", "--system", "Be brief.", *common)
    run("complete", *common)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    chat = {"messages": [system, user], "temperature": 0.5, "max_completion_tokens": 7}
    text = {"prompt": "Hi", "temperature": 0.5, "max_tokens": 7}
    assert sent == [("/v1/chat/completions", "m", chat), ("/v1/completions", "m", text)]


def test_without_quick_each_line_is_continued(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n\nTwice\n/quit\nnever\n"))
    run("complete", "--model", "m")
    assert [(path, fields["prompt"]) for path, _, fields in sent] == [
        ("/v1/completions", "Once"),
        ("/v1/completions", "Twice"),
    ]


def test_batches_go_where_told_and_announce_their_end(sent: Sent, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"{}\n")
    run("batches", "create", str(file), "--endpoint", "/v1/embeddings", "--callback-url", "https://a.example/b")
    run("batches", "list", "--limit", "3")
    body = {
        "input_file_id": "file_1", "endpoint": "/v1/embeddings", "completion_window": "24h", "priority": "low",
        "callback_url": "https://a.example/b",
    }  # fmt: skip
    assert sent == [
        ("/v1/files", "in.jsonl", b"{}\n", {"purpose": "batch"}),
        ("POST", "/v1/batches", body),
        ("GET", "/v1/batches?limit=3", None),
    ]


def test_no_more_is_listed_and_looked_at_than_told(sent: Sent) -> None:
    run("requests", "list", "--limit", "5", "--state", "failed")
    run("top", "--once", "--every", "2")
    assert sent == [("GET", "/v1/requests?limit=5&state=failed", None), ("/ui/feed?every=2.0&frames=1",)]


def test_a_canary_is_started_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Sent = []
    monkeypatch.setattr(canary, "ask", lambda *given: sent.append(given) or {})
    words = ("--weight", "10%", "--max-regression", "0.2", "--max-error-increase", "2%", "--alpha", "5%")
    run("canary", "start", "chat", "new", "--control", "old", "--min-samples", "80", "--json", *words)
    [(method, path, _, _, body)] = sent
    assert (method, path) == ("PUT", "/admin/canary/chat")
    assert body == {
        "canary": "new", "control": "old", "min_samples": 80, "weight": 0.1, "max_regression": 0.2,
        "max_error_increase": 0.02, "alpha": 0.05,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "assumed", "changes"),
    [
        ("--peak", "6", "peak", {("machine", "streaming"), ("machine", "hybrid")}),
        ("--waiting", "0.9", "waiting", {("machine", "hybrid"), ("provider", "hybrid")}),
        ("--batch-discount", "0.1", "batch_discount", {("provider", "batch"), ("provider", "hybrid")}),
    ],
)
def test_assumptions_of_cost_change_what_rests_on_them(
    capsys: pytest.CaptureFixture[str], option: str, value: str, assumed: str, changes: set[tuple[str, str]]
) -> None:
    given = ("cost", "--json", "--tokens-per-day", "2b", "--tokens-per-second", "2000", "--hour-price", "2",
             "--per-token-price", "1/3")  # fmt: skip

    def costs(*more: str) -> tuple[dict[tuple[str, str], float], float]:
        run(*given, *more)
        found = json.loads(capsys.readouterr().out)
        prices = {(one["where"], one["way"]): one["per_day"] for one in found["scenarios"]}
        return prices, found["assumptions"][assumed]

    (before, _), (after, found) = costs(), costs(option, value)
    assert found == float(value)
    assert {name for name in before if before[name] != after[name]} == changes


Catch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Catch:
    def catch(module: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """What `run` of a module would be given, positions by `names`."""
        calls: list[dict[str, Any]] = []

        def instead(*values: Any, **more: Any) -> None:
            calls.append({**dict(zip(names, values, strict=True)), **more})

        monkeypatch.setattr(module, "run", instead)
        return calls

    return catch


def test_measurements_are_made_as_told(caught: Catch) -> None:
    throughput = caught(bench_throughput, ("config", "dataset", "output"))
    run("bench", "throughput", "--seed", "7", "--num-prompts", "300", "--dtype", "float32")
    assert throughput[0]["dataset"].seed == throughput[0]["config"].seed == 7
    assert throughput[0]["config"].dtype == "float32"
    assert throughput[0]["config"].max_queue >= 300, "nobody is turned away"
    batching = caught(bench_batching, ("config",))
    run("bench", "batching", "--no-plot")
    run("bench", "batching")
    assert [call["plot"] for call in batching] == [None, Path("bench-results/batching.png")]


def test_a_calibration_is_made_as_told(caught: Catch, tmp_path: Path) -> None:
    calls = caught(run_calibrate, ("config", "flags", "output", "name"))
    file = tmp_path / "p.json"
    run("calibrate", "--output", str(file), "--name", "mine", "--no-serve", "--price-per-hour", "2", "--threads", "1")
    run("calibrate", "--output", str(file))
    assert [(c["output"], c["name"], c["serve"], c["price_per_hour"]) for c in calls] == [
        (file, "mine", False, 2.0),
        (file, "p", True, None),
    ]
    assert (calls[0]["config"].threads, calls[0]["flags"]) == (1, {"threads": "1"})


def test_settings_may_come_from_a_file(
    caught: Catch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROPEWAY_DATA_DIR", str(tmp_path))
    file = tmp_path / "ropeway.yaml"
    file.write_text("max-num-seqs: 5\nwebhook-secret: whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\n")
    calls = caught(run_file, ("engine", "server"))
    run("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--config", str(file))
    assert calls[0]["engine"].max_num_seqs == 5
    run("webhooks", "secret", "--config", str(file))
    assert capsys.readouterr().out == "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\n"
    run("webhooks", "list", "--config", str(file), "--limit", "5", "--json")
    assert capsys.readouterr().out == ""


def test_a_replay_ends_where_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: Sent = []

    def instead(journal: Path, *, until: int | None, explain: int | None) -> None:
        asked.append((journal, until, explain))
        raise ConfigError("that was all")

    monkeypatch.setattr("ropeway.sim.replay.replay", instead)
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path), "--until", "7"])
    assert asked == [(tmp_path, 7, None)]


@pytest.mark.parametrize("option", ["--max-queue", "--default-priority", "--tenant-weights", "--reserved-seats"])
def test_what_would_mean_nothing_to_a_measurement_is_not_taken(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("throughput", "batching"):
        with pytest.raises(SystemExit) as end:
            main(["bench", verb, option, "1"])
        assert end.value.code == 2
        assert option in capsys.readouterr().err
