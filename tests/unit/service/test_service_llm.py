"""The offline `LLM` over the fake executor."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from msgspec.structs import replace
from servicekit import INFO, make_text

from ropeway.config import EngineConfig
from ropeway.contract import SamplingParams
from ropeway.errors import ConfigError, ContextLengthError, NeverFitsError, OverloadedError, RequestError
from ropeway.service.llm import LLM, _engine_config
from ropeway.sim.executor import FakeExecutor
from ropeway.text.template import ChatTemplate

GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=1)


def make(template: ChatTemplate | None = None, **executor: object) -> LLM:
    return LLM.over(FakeExecutor(INFO, **executor), make_text(template=template), EngineConfig(max_num_seqs=8))  # type: ignore[arg-type]


def test_answers_keep_the_order_of_the_prompts_and_every_form_is_the_same_prompt() -> None:
    llm = make()
    prompts = ["one", {"prompt": "two"}, {"prompt_token_ids": [256, *b"one"]}, [256, *b"two"]]
    results = llm.generate(prompts, GREEDY)
    assert [result.prompt for result in results] == ["one", "two", None, None]
    assert [result.prompt_token_ids for result in results[:2]] == [result.prompt_token_ids for result in results[2:]]
    assert [result.outputs for result in results[:2]] == [result.outputs for result in results[2:]]
    assert results[0].outputs[0].text != results[1].outputs[0].text
    assert all(result.finished and len(result.outputs[0].token_ids) <= 12 for result in results)
    assert results[0].metrics.prompt_tokens == 4
    assert llm.generate("one", GREEDY)[0].outputs == results[0].outputs
    assert llm.generate([256, *b"one"], GREEDY)[0].outputs == results[0].outputs
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_parameters() -> None:
    long, short = SamplingParams(max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=3, ignore_eos=True)
    results = make().generate(["a", "b"], [long, short])
    assert [(len(r.outputs[0].token_ids), r.outputs[0].finish_reason) for r in results] == [
        (20, "length"),
        (3, "length"),
    ]
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        make().generate(["a", "b"], [long])


def test_a_stop_string_ends_an_answer_and_frees_its_seat() -> None:
    llm = make()
    free = llm.generate("hello", SamplingParams(max_tokens=60, seed=3, ignore_eos=True))[0].outputs[0]
    stop = next(c for c in free.text if c.isascii())
    stopped = llm.generate("hello", SamplingParams(max_tokens=60, seed=3, ignore_eos=True, stop=stop))[0].outputs[0]  # type: ignore[arg-type]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert free.text.startswith(stopped.text + stop)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    while llm._engine.busy:
        llm._engine.step()
    assert llm._engine.scheduler.pool.used == 0


def test_several_answers_to_one_prompt_differ_by_seed() -> None:
    [result] = make().generate("x", SamplingParams(max_tokens=8, seed=1, ignore_eos=True), n=3)
    assert [output.index for output in result.outputs] == [0, 1, 2]
    assert len({output.text for output in result.outputs}) == 3
    [alone] = make().generate("x", SamplingParams(max_tokens=8, seed=2, ignore_eos=True))
    assert alone.outputs[0].text == result.outputs[1].text


def test_conversations() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    llm = make(template)
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]}]
    [result] = llm.chat(chat, GREEDY)
    assert result.prompt == "[user]hi\nyou"
    silent = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert llm.chat(silent, GREEDY)[0].prompt == "[user]hi[assistant]"
    assert [r.prompt for r in llm.chat([chat, chat], GREEDY)] == [result.prompt] * 2
    assert llm.chat(chat, GREEDY, chat_template="T")[0].prompt == "T"
    with pytest.raises(RequestError, match="text parts"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}])
    llm.close()


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_to_whoever_wants_it(
    terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    make().generate(["a", "b", "c"], GREEDY, use_tqdm=wanted)
    out, shown = capsys.readouterr()
    assert out == ""
    if terminal and wanted:
        assert "Answers" in shown
        assert "3/3" in shown
        assert re.search(r"[1-9]\d* tokens/s", shown)
    else:
        assert shown == ""


def test_a_bad_prompt_raises_before_anything_runs() -> None:
    steps = FakeExecutor(INFO)
    llm = LLM.over(steps, make_text(), EngineConfig(max_num_seqs=8))
    with pytest.raises(ContextLengthError):
        llm.generate(["fine", "x" * 500], GREEDY)
    with pytest.raises(RequestError, match="Prompt 1 is a float"):
        llm.generate(["fine", 1.5], GREEDY)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("fine", SamplingParams(temperature=-1))
    with pytest.raises(RequestError, match="n is 0"):
        llm.generate("fine", n=0)
    assert steps.steps == 0
    tiny = FakeExecutor(replace(INFO, num_blocks=2))
    llm = LLM.over(tiny, make_text(), EngineConfig(max_num_seqs=8))
    with pytest.raises(NeverFitsError):
        llm.generate(["x", "y" * 100], GREEDY)
    assert tiny.steps == 0
    assert llm.generate("x", GREEDY)[0].finished


def test_a_request_that_fails_while_it_runs_hurts_no_other() -> None:
    llm = make(fault=lambda rid, index: "NaN" if rid == 1 and index == 3 else None)
    alone = make().generate("b", SamplingParams(max_tokens=9, seed=1, ignore_eos=True))[0]
    bad, good = llm.generate(["a", "b"], SamplingParams(max_tokens=9, seed=1, ignore_eos=True))
    assert (bad.outputs[0].finish_reason, bad.error.code, len(bad.outputs[0].token_ids)) == ("error", "RW-NAN", 3)
    assert good.outputs == alone.outputs


def test_unknown_settings_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("bundled", max_num_seq=4)
    with pytest.raises(ConfigError, match="at least 1"):
        LLM("bundled", max_num_seqs=0)


def test_what_a_model_says_is_read_without_torch() -> None:
    code = (
        "import sys, ropeway.service.loader as l;"
        "l.load_text('bundled'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_queue_has_no_end_but_the_one_that_is_given() -> None:
    assert len(LLM.over(FakeExecutor(INFO), make_text()).generate(["a"] * 300, SamplingParams(max_tokens=1))) == 300
    short = LLM.over(FakeExecutor(INFO), make_text(), EngineConfig(max_queue=2))
    with pytest.raises(OverloadedError, match="--max-queue 2"):
        short.generate(["a"] * 4, GREEDY)
    assert short.generate("a", GREEDY)[0].finished
    assert _engine_config("m", {"preset": "latency"}).max_queue > 10**6
    assert _engine_config("m", {"max_queue": 3}).max_queue == 3
