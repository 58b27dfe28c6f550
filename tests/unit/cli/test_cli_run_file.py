"""Answers to a file of requests: kept as they come, written in order, and never lost or doubled by an interruption."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from clikit import run as command
from clikit import terminal
from hypothesis import given
from hypothesis import strategies as st

from accountkit import used
from ropeway.api.app import create_app
from ropeway.cli import run_file
from ropeway.cli.offline import Offline
from ropeway.cli.run_file import Partial, Progress, answer, answer_all, run
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import ConfigError, EngineError, RopewayError
from ropeway.jobs.work import Call, Reply
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest

REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


class Interrupted(Exception):
    pass


class Stub:
    """Answers with the body it was sent. Refuses the first `refused` calls of each, and ends the run after `most`."""

    def __init__(self, refused: int = 0, most: int = 10**9, status: int = 503) -> None:
        self.calls: list[str] = []
        self.refused = dict[str, int]()
        self._refused, self._most, self._status = refused, most, status

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(0)
        prompt = json.loads(call.body)["prompt"]
        times = self.refused.get(prompt, 0)
        if times < self._refused:
            self.refused[prompt] = times + 1
            return Reply(status=self._status, body=b'{"error":{}}', retry_after=0.001)
        if len(self.calls) >= self._most:
            raise Interrupted
        self.calls.append(prompt)
        return Reply(status=200, body=call.body, request_id=call.request_id)


def source(folder: Path, count: int) -> Path:
    path = folder / "in.jsonl"
    wanted = [{**REQUEST, "custom_id": f"c{n}", "body": {"prompt": f"p{n}"}} for n in range(count)]
    path.write_text("".join(json.dumps(one) + "\n" for one in wanted))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_each_line_is_answered_once_however_often_the_run_ends(tmp_path: Path) -> None:
    path, asked = source(tmp_path, 50), list[str]()
    for most in (0, 7, 20, 10**9):
        partial, stub = Partial(tmp_path / "out.partial", "name"), Stub(most=most)
        try:
            with Progress(50, len(partial)) as progress:
                await answer_all(stub, path, partial, 4, progress)
        except Interrupted:
            partial.close()
        asked += stub.calls
    assert sorted(asked) == sorted(f"p{n}" for n in range(50))
    partial.finish(tmp_path / "out.jsonl")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in out] == [f"c{n}" for n in range(50)]
    assert [one["response"]["body"]["prompt"] for one in out] == [f"p{n}" for n in range(50)]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.binary(max_size=20)), unique_by=lambda one: one[0], max_size=20),
    st.integers(0, 40),
)
def test_a_torn_file_has_its_whole_lines(answers: list[tuple[int, bytes]], cut: int) -> None:
    answers = [(number, data.replace(b"\n", b"")) for number, data in answers]
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "p.partial", Path(folder) / "out"
        partial = Partial(path, "name")
        for number, data in answers:
            partial.add(number, data)
        partial.close()
        whole = path.read_bytes()
        mark = whole.index(b"\n") + 1
        torn = whole[: max(mark, len(whole) - cut)]
        path.write_bytes(torn)
        kept = dict(answers[: torn.count(b"\n") - 1])
        again = Partial(path, "name")
        assert {number for number, _ in answers if number in again} == set(kept)
        for number, data in answers:
            if number not in again:
                again.add(number, data)
        again.finish(output)
        assert output.read_bytes() == b"".join(data + b"\n" for _, data in sorted(answers))


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    first = Partial(tmp_path / "p", "one model")
    first.add(1, b"{}")
    first.close()
    with pytest.raises(ConfigError, match="--restart"):
        Partial(tmp_path / "p", "another model")
    fresh = Partial(tmp_path / "p", "another model", restart=True)
    assert len(fresh) == 0
    fresh.close()


async def test_a_busy_engine_is_asked_again_and_a_wrong_request_is_not() -> None:
    stub = Stub(refused=3)
    made = await answer(stub, json.dumps(REQUEST).encode(), "name")
    assert made.response is not None
    assert (made.response.status_code, stub.refused, stub.calls) == (200, {"x": 3}, ["x"])
    wrong = Stub(refused=1, status=400)
    made = await answer(wrong, json.dumps(REQUEST).encode(), "name")
    assert made.response is not None
    assert (made.response.status_code, wrong.calls) == (400, [])
    hopeless = Stub(refused=100)
    made = await answer(hopeless, json.dumps(REQUEST).encode(), "name")
    assert made.response is not None
    assert (made.response.status_code, hopeless.refused["x"] < 10) == (503, True)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b'{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}', "invalid_json_line"),
        (json.dumps({**REQUEST, "method": "PUT"}).encode(), "invalid_method"),
    ],
)
async def test_a_line_that_is_no_request_has_an_error_in_its_place(line: bytes, code: str) -> None:
    stub = Stub()
    made = await answer(stub, line, "name")
    assert made.error is not None
    assert (made.error.code, made.response, stub.calls) == (code, None, [])


def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    def refused(**changes: Path) -> str:
        paths: dict[str, Path] = {"source": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl", **changes}
        with pytest.raises(ConfigError) as error:
            run(EngineConfig(), ServerConfig(), **paths, folder=None, inflight=None, restart=False)
        return error.value.message

    assert "in.jsonl cannot be used" in refused()
    (tmp_path / "in.jsonl").write_text("\n\n")
    assert "has no requests" in refused()
    source(tmp_path, 1)
    assert "is a directory" in refused(output=tmp_path)
    assert "cannot be used" in refused(output=tmp_path / "in.jsonl" / "below a file")
    (tmp_path / "out.jsonl.partial").write_text("ropeway run-batch 1 of-another-file\n")
    assert "--restart" in refused()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress(100, 40, clock=lambda: now) as progress:
        for count in range(30):
            now += 1.0
            progress.one(failed=count == 3)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "50 of 100 done, 1 failed, 1.0/s, about 50 s left",
        "60 of 100 done, 1 failed, 1.0/s, about 40 s left",
        "70 of 100 done, 1 failed, 1.0/s, about 30 s left",
    ]
    assert (str(progress), progress.rate) == ("70 of 100 done, 1 failed", 1.0)


class Offlines:
    """Engines of run-batch, which echo. The last that was started is `gone` when a test says so. `asked` counts their
    requests, and `at` is called with the number of each."""

    def __init__(self) -> None:
        self.asked = 0
        self.gone: asyncio.Future[RopewayError | None] | None = None

    def at(self, number: int) -> None:
        pass

    def heard(self, request: TextRequest, sent: int) -> RopewayError | None:
        if sent == 0:
            self.asked += 1
            self.at(self.asked)
        return None

    @asynccontextmanager
    async def __call__(self, engine: EngineConfig, server: ServerConfig) -> AsyncIterator[Offline]:
        self.gone = asyncio.get_running_loop().create_future()
        app = create_app(EchoService(failure=self.heard), server, Metrics("echo"))
        yield Offline(app, 1, self.gone)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Offlines:
    made = Offlines()
    monkeypatch.setattr(run_file, "offline", made)
    monkeypatch.setenv("ROPEWAY_DATA_DIR", str(tmp_path / "data"))
    return made


def words(folder: Path) -> tuple[str, ...]:
    return ("run-batch", "-i", str(folder / "in.jsonl"), "-o", str(folder / "out" / "out.jsonl"), "--max-inflight", "1")


def test_ctrl_c_says_how_far_it_is_and_the_same_command_goes_on(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, 20)
    monkeypatch.setattr(engines, "at", lambda number: signal.raise_signal(signal.SIGINT) if number == 8 else None)
    code, _, err = command(capsys, *words(tmp_path))
    assert names(tmp_path / "out") == ["out.jsonl.partial"]
    kept = (tmp_path / "out" / "out.jsonl.partial").read_bytes().count(b"\n") - 1
    assert kept in (7, 8)
    assert code == 130
    assert f"interrupted: {kept} of 20 done, 0 failed. The same command goes on from there." in err
    code, _, err = command(capsys, *words(tmp_path))
    assert (code, f"going on after {kept} of 20 requests" in err) == (0, True)
    assert engines.asked == 8 + 20 - kept
    assert (tmp_path / "out" / "out.jsonl").read_text().count("\n") == 20


def test_an_engine_that_is_gone_ends_the_run_with_its_reason(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, 20)
    reasons = {4: EngineError("It has no memory left."), 8: None}

    def fall(number: int) -> None:
        if number in reasons:
            assert engines.gone is not None
            engines.gone.set_result(reasons[number])

    monkeypatch.setattr(engines, "at", fall)
    code, _, err = command(capsys, *words(tmp_path))
    assert (code, "RW-ENGINE: It has no memory left." in err) == (1, True)
    code, _, err = command(capsys, *words(tmp_path))
    assert (code, "The engine has ended before the last answer" in err) == (1, True)
    assert command(capsys, *words(tmp_path))[0] == 0
    out = [json.loads(line)["custom_id"] for line in (tmp_path / "out" / "out.jsonl").read_text().splitlines()]
    assert out == [f"c{n}" for n in range(20)]


def test_a_full_disk_is_told_of_by_the_files_name_and_nothing_is_lost(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files refuses as a full disk does: a write, which names no file."""
    source(tmp_path, 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(
        engines,
        "at",
        lambda number: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])) if number == 1 else 0,
    )
    try:
        code, _, err = command(capsys, *words(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    partial = tmp_path / "out" / "out.jsonl.partial"
    assert (code, err.splitlines()[-1]) == (
        2, f"RW-CFG: {partial} cannot be written: File too large. Make room; the same command goes on from there."
    )  # fmt: skip
    kept = partial.read_bytes().count(b"\n") - 1
    assert 10 < kept < 100
    code, _, err = command(capsys, *words(tmp_path))
    assert (code, f"going on after {kept} of 100 requests" in err) == (0, True)


def test_what_is_computed_is_counted_where_prices_are_given(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("models: {echo: {input: 1, output: 2}}\n")
    monkeypatch.setenv("ROPEWAY_PRICES", str(prices))
    source(tmp_path, 3)
    assert command(capsys, *words(tmp_path))[0] == 0
    [row] = used(tmp_path / "data")
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (3, 6, 6)
    assert row.cost == pytest.approx((6 * 1 + 6 * 2) / 1e6)


def test_on_a_terminal_there_is_a_bar(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, 5)
    with terminal(monkeypatch, "stderr") as seen:
        assert command(capsys, *words(tmp_path))[0] == 0
    assert "5/5 requests" in seen.text
    assert "5 of 5 done, 0 failed" in seen.text


def test_a_misspelt_variable_is_named_before_the_run(
    engines: Offlines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, 1)
    monkeypatch.setenv("ROPEWAY_MAX_NUM_SEQ", "3")
    code, _, err = command(capsys, *words(tmp_path))
    assert (code, "Did you mean ROPEWAY_MAX_NUM_SEQS?" in err) == (0, True)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_answers_may_be_kept_on_another_file_system(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert Path(folder).stat().st_dev != tmp_path.stat().st_dev
        partial = Partial(tmp_path / "kept.partial", "name")
        for number in (2, 1):
            partial.add(number, b"{%d}" % number)
        output = Path(folder) / "out.jsonl"
        output.write_text("of an earlier run")
        partial.finish(output)
        assert output.read_text() == "{1}\n{2}\n"
        assert names(Path(folder)) == ["out.jsonl"]
    assert names(tmp_path) == []
