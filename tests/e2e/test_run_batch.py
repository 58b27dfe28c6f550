"""`ropeway run-batch` as its users run it, also when it is killed; and `ropeway batches` against a server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import Result
from running import SMALL, Server, environment, ropeway
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.errors import RequestError
from waiting import until

ITEMS = 80


def line(n: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "bundled", "prompt": f"Story {n}:", "max_tokens": 16, "ignore_eos": True, "seed": n}
    return {"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body} | changes


def words(folder: Path, *more: str) -> list[str]:
    flags = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", "bundled"]
    flags += ["--output-tmp-dir", str(folder / "kept")]
    return ["run-batch", *flags, *SMALL, *more]


def write(path: Path, wanted: Sequence[Any]) -> None:
    path.write_text("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in wanted))


def read(path: Path) -> list[Any]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    chat = {"model": "bundled", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    odd = [
        line(ITEMS, url="/v1/chat/completions", body=chat),
        line(ITEMS + 1, url="/v1/embeddings", body={"model": "bundled", "input": "a story"}),
        line(ITEMS + 2, body={"model": "other", "prompt": "x"}),
        line(ITEMS + 3, url="/v1/models"),
        line(ITEMS + 4, method="GET"),
        "{no json\n",
    ]
    write(tmp_path / "in.jsonl", ["\ufeff", *(line(n) for n in range(ITEMS)), "\n", *odd])
    partial = tmp_path / "kept" / "out.jsonl.partial"
    command = [sys.executable, "-m", "ropeway", *words(tmp_path, "--max-inflight", "4")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:
        until(lambda: (partial.exists() and partial.read_bytes().count(b"\n") >= 10) or process.poll() is not None)
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.kill()
    with partial.open("ab") as torn:
        torn.write(b'17 {"id": "cut in the mid')
    kept = partial.read_bytes().count(b"\n") - 1
    assert kept >= 9
    assert not (tmp_path / "out.jsonl").exists(), "there is no output before all of it is there"
    done = ropeway(*words(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on after {kept} of {ITEMS + 6} requests" in done.stderr
    assert f"{ITEMS + 6} of {ITEMS + 6} done, 4 failed" in done.stderr
    assert not partial.exists()
    out = read(tmp_path / "out.jsonl")
    assert [one["custom_id"] for one in out] == [*(f"c{n}" for n in range(ITEMS + 5)), None]
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in out[: ITEMS + 2])
    assert [one["response"] and one["response"]["status_code"] for one in out[ITEMS + 2 :]] == [404, 404, None, None]
    assert [one["error"] and one["error"]["code"] for one in out[-2:]] == ["invalid_method", "invalid_json_line"]
    assert len({one["id"] for one in out}) == ITEMS + 6


def test_batches_from_the_command_line(bundled: Server, tmp_path: Path) -> None:
    def batches(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["batches", *arguments, "--url", bundled.url])

    source, answers = tmp_path / "in.jsonl", tmp_path / "answers.jsonl"
    write(source, [line(0), line(1), line(2, body={"model": "bundled", "prompt": 7})])
    made = batches("create", str(source), "--wait", "--window", "1h", "--priority", "medium")
    name = re.search(r"batch_[0-9a-f]{32}", made.output)
    assert name is not None, made.output
    assert re.search(r"status +completed", made.output)
    assert re.search(r"requests_failed +1", made.output)
    assert json.loads(batches("get", name[0], "--json").stdout)["completion_window"] == "1h"
    assert name[0] in batches("list").stdout
    assert "completed" in batches("cancel", name[0]).stdout
    assert batches("output", name[0], "-o", str(answers)).exit_code == 0
    assert [one["custom_id"] for one in read(answers)] == ["c0", "c1"]
    assert json.loads(batches("output", name[0], "--errors").stdout)["custom_id"] == "c2"
    unknown = batches("get", "batch_" + "0" * 32)
    assert isinstance(unknown.exception, RequestError)
    assert "No batch found" in unknown.exception.message
    write(source, [line(0), line(0)])
    assert "line 2: duplicate_custom_id" in batches("create", str(source), "--wait").stdout
