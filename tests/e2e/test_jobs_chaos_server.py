"""The real server with its model, killed every few seconds until a large batch is done: nothing lost, nothing twice.

Long: it runs where ROPEWAY_CHAOS_SERVER_ITEMS says how many requests (20000 take minutes). One kill is always tested,
by `test_jobs_restart.py`, and many kills of processes that start faster, by `test_jobs_chaos.py`.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import httpx2
import pytest
from running import serving

ITEMS = int(os.environ.get("ROPEWAY_CHAOS_SERVER_ITEMS", "0"))
LIFE_SECONDS = 5.0
URL = "/v1/completions"


def line(number: int) -> bytes:
    body = {"model": "bundled", "prompt": f"{number}", "max_tokens": 1, "temperature": 0}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": URL, "body": body}).encode() + b"\n"


@pytest.mark.slow
@pytest.mark.timeout(600 + ITEMS / 20)
@pytest.mark.skipif(not ITEMS, reason="long; set ROPEWAY_CHAOS_SERVER_ITEMS")
def test_a_server_killed_again_and_again(tmp_path: Path) -> None:
    dice = random.Random(3)
    flags = ("--data-dir", str(tmp_path / "data"), "--max-batch-requests", "1000000")
    batch_id, kills, begun = "", 0, time.monotonic()
    while True:
        with serving(*flags) as server, server.client() as client:
            if not batch_id:
                data = b"".join(map(line, range(ITEMS)))
                file = client.files.create(file=("in.jsonl", data), purpose="batch")
                batch_id = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
            life = time.monotonic() + LIFE_SECONDS * dice.uniform(0.5, 1.5)
            while (batch := client.batches.retrieve(batch_id)).status != "completed" and time.monotonic() < life:
                time.sleep(0.1)
            if batch.status == "completed":
                answers = [
                    json.loads(one) for one in client.files.content(batch.output_file_id or "").text.splitlines()
                ]
                direct = httpx2.post(f"{server.url}{URL}", json=json.loads(line(7))["body"]).json()
                break
            server.process.kill()
            server.process.wait(60)
            kills += 1
    assert [one["custom_id"] for one in answers] == [f"c{number}" for number in range(ITEMS)]
    assert answers[7]["response"]["body"]["choices"] == direct["choices"]
    print(f"{ITEMS} items, {kills} kills, {time.monotonic() - begun:.1f} s")
