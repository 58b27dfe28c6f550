"""`ropeway webhooks` on a data directory, beside a server that may be running."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path

import openai
import pytest

from ropeway.cli.main import main
from ropeway.jobs import outbox
from ropeway.jobs.signing import new_secret
from ropeway.store import Database
from webhookkit import receiving, status


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROPEWAY_WEBHOOK_SECRET", raising=False)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    with pytest.raises(SystemExit) as end:
        main(["webhooks", *words])
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


def owing(folder: Path, *urls: str) -> Database:
    database = Database(folder / "jobs.db", [outbox.SCHEMA])
    for url in urls:
        database.write_now(
            lambda c, url=url: outbox.add(c, type="job.failed", subject="job_1", url=url, tenant="t", created=1e9)
        )
    return database


def test_the_secret_is_made_once_and_for_nobody_else_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    code, first, _ = run(capsys, "secret", "--data-dir", str(folder))
    assert code == 0
    assert len(base64.b64decode(first.strip().removeprefix("whsec_"))) == 32
    assert run(capsys, "secret", "--data-dir", str(folder))[1] == first
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    _, second, _ = run(capsys, "secret", "--rotate", "--data-dir", str(folder))
    assert file.read_text() == second + first
    _, third, _ = run(capsys, "secret", "--rotate", "--data-dir", str(folder))
    assert file.read_text() == third + second
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_given_secrets_stand_above_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, given = str(tmp_path), f"{new_secret()},{new_secret()}"
    assert run(capsys, "secret", "--data-dir", folder, "--webhook-secret", given)[1] == given.split(",")[0] + "\n"
    assert not list(tmp_path.iterdir())
    code, _, said = run(capsys, "secret", "--rotate", "--data-dir", folder, "--webhook-secret", given)
    assert (code, "--webhook-secret" in said) == (2, True)
    for wrong in ("password", "whsec_short", "whsec_" + "A" * 200, "whsec_" + "!" * 44):
        code, out, said = run(capsys, "secret", "--data-dir", folder, "--webhook-secret", wrong)
        assert (code, out) == (2, "")
        assert wrong not in said, "secrets do not belong into messages"


def test_events_are_listed_and_sent_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--data-dir", str(tmp_path))
    assert len(run(capsys, "list", *where)[1].splitlines()) == 1
    assert not list(tmp_path.iterdir()), "looking makes no files"
    database = owing(tmp_path, "https://a.example/x", "https://b.example/y")
    [failing], _ = database.write_now(lambda c: outbox.claim(c, now=2e9, lease=60.0, most=1, each=1, busy={}))
    database.write_now(lambda c: outbox.failed(c, failing, now=2e9, status=500, error="HTTP 500", due=None))
    shown = run(capsys, "list", *where)[1]
    assert "https://b.example/y" in shown
    assert "HTTP 500" in shown
    [entry] = map(json.loads, run(capsys, "list", "--state", "failed", "--json", *where)[1].splitlines())
    assert (entry["event"], entry["attempts"], entry["status"]) == (failing.event, 1, 500)
    assert run(capsys, "list", "--state", "lost", *where)[0] == 2
    assert run(capsys, "retry", "--failed", *where)[1] == "1 to send again\n"
    assert run(capsys, "retry", failing.event, *where)[1] == "1 to send again\n"
    assert run(capsys, "list", "--state", "failed", "--json", *where)[1] == ""
    for wrong in ((), ("--failed", failing.event), ("evt_unknown",)):
        code, _, said = run(capsys, "retry", *wrong, *where)
        assert code != 0
        assert said
    database.close()


async def test_a_test_event_goes_where_events_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--data-dir", str(tmp_path))
    async with receiving(status(200), status(302)) as receiver:
        url = receiver.url()
        code, _, said = await asyncio.to_thread(run, capsys, "test", url, *where)
        assert (code, receiver.hits) == (1, [])
        assert "--webhook-allow-http" in said
        rules = ("--webhook-allow", "127.0.0.0/8", "--webhook-allow-http", "--webhook-ports", "1-65535")
        code, out, said = await asyncio.to_thread(run, capsys, "test", url, *rules, *where)
        assert (code, "HTTP 200" in out) == (0, True), said
        code, _, said = await asyncio.to_thread(run, capsys, "test", url, "--webhook-url", url, *where)
        assert (code, "HTTP 302" in said) == (1, True)
    secret = (tmp_path / "webhook_secret").read_text().strip()
    client = openai.OpenAI(api_key="unused", webhook_secret=secret)
    assert client.webhooks.unwrap(receiver.hits[0].body, receiver.hits[0].headers).type == "webhook.test"
