"""Answers to a file of requests: kept as they come, written in order, and never lost or doubled by an interruption."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.cli.run_file import Partial, Progress, answer, answer_all, run
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import ConfigError
from ropeway.jobs.work import Call, Reply

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
