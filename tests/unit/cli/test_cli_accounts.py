"""The commands of keys, usage and cost."""

from __future__ import annotations

import csv
import io
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ropeway.accounts import keys as table
from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.usage import HOUR
from ropeway.cli.main import app
from ropeway.cli.server import with_weights
from ropeway.config import EngineConfig, weights_of
from ropeway.errors import RopewayError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROPEWAY_DATA_DIR", str(tmp_path))
    return tmp_path


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*words: str) -> str:
    with pytest.raises(RopewayError) as caught:
        run(*words)
    return caught.value.message


def test_a_key_from_its_making_to_its_end(data: Path) -> None:
    made = run("keys", "create", "alice", "--tokens-per-minute", "60k", "--models", "a, b", "--expires", "30d")
    secret = made.stdout.strip()
    assert secret.startswith("rw-")
    assert secret not in made.stderr
    with closing(open_accounts(data)) as store:
        account = store.read_now(lambda c: table.find(c, table.digest_of(secret.encode())))
    assert account is not None
    assert account.limits.tokens_per_minute == 60_000
    assert account.limits.models == ("a", "b")
    assert account.expires == pytest.approx(time.time() + 30 * 86400, abs=60)
    listed = run("keys", "list").stdout
    assert "60,000 tokens/min, only a b, until " in listed
    assert secret not in listed
    changed = run("keys", "update", "alice", "--models", "none", "--concurrency", "3", "--expires", "none").stdout
    assert changed == f"{account.id}, named alice: 60,000 tokens/min, 3 at a time\n"
    [shown] = json.loads(run("keys", "list", "--json").stdout)
    assert shown["limits"]["concurrency"] == 3
    assert shown["limits"]["models"] == []
    assert run("keys", "revoke", account.id).stdout == f"{account.id}, named alice, is revoked.\n"
    assert "alice" not in run("keys", "list").stdout
    assert "revoked" in run("keys", "list", "--all").stdout
    again = json.loads(run("keys", "create", "alice", "--json").stdout)
    assert again["key"].startswith(again["hint"])
    assert again["limits"]["weight"] == 1.0


def test_what_is_wrong_is_said_with_what_would_be_right(data: Path) -> None:
    assert "keys create" in refused("keys", "list")
    assert list(data.iterdir()) == [], "to look makes no files"
    assert "'many'; it must be a whole number" in refused("keys", "create", "a", "--requests-per-minute", "many")
    assert "at least 1" in refused("keys", "create", "a", "--concurrency", "0")
    assert "30d" in refused("keys", "create", "a", "--expires", "soon")
    assert "one of month, total" in refused("keys", "create", "a", "--budget-period", "week")
    run("keys", "create", "a")
    assert "already" in refused("keys", "create", "a")
    assert "no key 'b'" in refused("keys", "revoke", "b")
    assert "month, day, hour" in refused("usage", "--by", "colour")
    assert "2026-11-30" in refused("usage", "--since", "yesterday")


def used(data: Path, *rows: tuple[str, int, str, int, int, int, int]) -> None:
    """Rows of (key, hour, model, requests, prompt, answer, cost)."""
    with closing(open_accounts(data)) as store:
        for key, hour, model, requests, prompt, answer, cost in rows:
            values = (key, hour, "t", model, requests, prompt, 0, answer, cost, 0)
            marks = ", ".join("?" * len(values))
            store.write_now(lambda c, v=values, m=marks: c.execute(f"INSERT INTO usage VALUES ({m})", v))
            pace = (hour, model, 100_000, prompt + answer)
            store.write_now(lambda c, p=pace: c.execute("INSERT INTO pace VALUES (?, ?, ?, ?)", p))


def test_usage_by_what_one_asks(data: Path) -> None:
    run("keys", "create", "alice")
    [shown] = json.loads(run("keys", "list", "--json").stdout)
    used(data, (shown["id"], 500_000, "m", 2, 10, 5, 1500), ("other", 500_024, "m", 1, 7, 7, 10**9))
    lines = run("usage", "--by", "key").stdout.splitlines()
    counts = ["requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens", "cost"]
    assert lines[0].split() == ["key", "name", *counts]
    assert f"{shown['id']} alice 2 10 0 5 15 0.0000015".split() in [line.split() for line in lines[1:]]
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "day", "--csv").stdout)))
    assert [(row["day"], row["total_tokens"], row["cost"]) for row in rows] == [
        ("2027-01-15", "15", "0.0000015"),
        ("2027-01-16", "14", "1"),
    ]
    assert "other" not in run("usage", "--key", "alice").stdout
    assert len(run("usage", "--since", "2027-01-16").stdout.splitlines()) == 2
    assert len(run("usage", "--until", "2027-01-16", "--by", "model").stdout.splitlines()) == 2


GIVEN = ("--tokens-per-day", "100m", "--written", "0.25", "--hour-price", "2", "--tokens-per-second", "2000",
         "--per-token-price", "1/3", "--once", "500")  # fmt: skip


def test_the_report_shows_what_it_assumes_and_what_follows(data: Path) -> None:
    text = run("cost", *GIVEN).stdout
    for assumption in ("100,000,000 (given)", "2.00 USD (given)", "2,000 tokens/s (given)", "1/3 USD", "50%", "30%"):
        assert assumption in text
    assert text.count("machine   ") == 3
    assert "machine   hybrid     at once or within a day           1        48.00      1,440.00       0.4800" in text
    assert "Cheapest: machine, batch." in text
    found = json.loads(run("cost", *GIVEN, "--json").stdout)
    assert found["scenarios"][5]["per_day"] == 48.0
    assert found["even_tokens_per_day"] == pytest.approx(32e6)


def test_the_report_takes_what_the_server_has_measured(data: Path) -> None:
    (data / "prices.yaml").write_text("currency: EUR\nmachine: 3\nmodels:\n  m: {input: 1, output: 2}\n")
    assert "--tokens-per-day" in refused("cost")
    now = int(time.time()) // HOUR
    used(data, ("k", now - 48, "m", 5, 600_000, 200_000, 0), ("k", now - 24, "m", 5, 300_000, 100_000, 0))
    text = run("cost", "--prices", str(data / "prices.yaml")).stdout
    assert "25% (measured over 2.0 days)" in text
    assert "3.00 EUR (from --prices)" in text
    assert "8,000 tokens/s (measured in the best hour, 2 busy minutes)" in text
    assert "1/2 EUR" in text
    [day] = [line for line in text.splitlines() if "tokens a day  " in line]
    assert float(day.split()[3].replace(",", "")) == pytest.approx(600_000, rel=0.05)
    assert "must be one price or two" in refused("cost", "--per-token-price", "cheap", "--tokens-per-day", "1m")


def test_the_report_refuses_to_guess_where_nothing_was_measured(data: Path) -> None:
    open_accounts(data).close()
    assert "--tokens-per-day" in refused("cost")
    for wrong in ("lots", "1x", "k"):
        assert f"--tokens-per-day is {wrong!r}; it must be a number" in refused("cost", "--tokens-per-day", wrong)


def test_the_weights_of_keys_reach_the_scheduler_unless_the_operator_says_otherwise(data: Path) -> None:
    engine, origins = EngineConfig(tenant_weights="b=5"), {"model": "default"}
    assert with_weights(engine, origins, data) == (engine, origins)
    for name, weight in (("a", "3"), ("b", "2"), ("c", "1")):
        run("keys", "create", name, "--tenant", name, "--weight", weight)
    found, where = with_weights(engine, origins, data)
    assert weights_of(found.tenant_weights) == {"a": 3.0, "b": 5.0}
    assert where["tenant_weights"] == f"the keys in {data}"


def test_the_report_looks_back_as_far_as_told(data: Path) -> None:
    now = int(time.time()) // HOUR
    used(data, ("k", now - 240, "m", 5, 900_000, 0, 0), ("k", now - 2, "m", 5, 300_000, 100_000, 0))
    given = ("cost", "--hour-price", "2", "--per-token-price", "1/3", "--json")
    near, far = (json.loads(run(*given, "--days", days).stdout)["assumptions"]["written"] for days in ("1", "30"))
    assert (near, far) == (pytest.approx(100 / 400), pytest.approx(100 / 1300))
