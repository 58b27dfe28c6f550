"""The engine without a server: `LLM(model).generate(prompts)` in one process."""

from __future__ import annotations

import difflib
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ropeway.config import EngineConfig, check, preset_values, settings
from ropeway.contract import Cancel, Command, GenerateRequest, Report, SamplingParams, Step, Submit, TokenEvent
from ropeway.contract.executor import Executor
from ropeway.errors import ConfigError, RequestError, RopewayError
from ropeway.recorder.recorder import make_engine
from ropeway.service.beam_offline import Beams
from ropeway.service.context import check_context, check_purpose
from ropeway.service.decoding import AnswerDecoder
from ropeway.service.encoder import Encoder
from ropeway.service.grammars import Grammars
from ropeway.service.loader import ModelText, load_text
from ropeway.service.offline import Bar, CompletionOutput, RequestOutput, by_token, flat_content, settle
from ropeway.service.params import check_tokens, validate, with_bad_words, with_max_tokens
from ropeway.service.pooled import Pools
from ropeway.service.prompts import Prompt, requests_of
from ropeway.service.request import ChatMessage, TextRequest
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import Tokenizer

_NO_QUEUE_LIMIT = 2**31


@dataclass
class _Job:
    """One answer under way."""

    output: CompletionOutput
    owner: RequestOutput
    decoder: AnswerDecoder
    parts: list[str] = field(default_factory=list)


class LLM(Pools, Beams):
    """A model and its engine in this process.

    `model` is 'bundled', a Hugging Face directory or a hub name; `tokenizer` and `chat_template` (a file) replace the
    model's own. All other settings are the fields of `EngineConfig`, with its defaults but two: nobody watches a stream
    here, so `step_budget_ms` is 0, and nobody else would answer, so `max_queue` has no end. Not thread-safe.
    Raises ConfigError, ModelError or MemoryBudgetError.
    """

    def __init__(
        self,
        model: str | Path = "bundled",
        *,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        **config: Any,
    ) -> None:
        model = str(model)
        self.config = check(_engine_config(model, {**config, "tokenizer": tokenizer}))
        text = load_text(
            model,
            revision=self.config.revision,
            download_dir=self.config.download_dir,
            model_impl=self.config.model_impl,
            tokenizer=tokenizer,
            chat_template=chat_template,
            max_model_len=self.config.max_model_len,
        )
        # Late, so that a service process that imports this module stays free of torch.
        from ropeway.runtime.open import open_executor

        self._set_up(open_executor(self.config), text)

    @classmethod
    def over(cls, executor: Executor, text: ModelText, config: EngineConfig | None = None) -> LLM:
        """An `LLM` over parts that exist already, such as a `FakeExecutor`."""
        llm = cls.__new__(cls)
        llm.config = check(config or EngineConfig(max_queue=_NO_QUEUE_LIMIT))
        llm._set_up(executor, text)
        return llm

    def _set_up(self, executor: Executor, text: ModelText) -> None:
        self._executor = executor
        self._text = text
        self._engine = make_engine(executor, self.config)
        self._encoder = Encoder(text.tokenizer, text.template)
        self._grammars = Grammars(text.tokenizer, text.eos_ids)
        self._rids = itertools.count(1)
        self._seeds = random.Random(self.config.seed)

    def get_tokenizer(self) -> Tokenizer:
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no `sampling_params` are given: the checkpoint's generation_config.json."""
        limit = self._text.generation.get("max_new_tokens", SamplingParams().max_tokens)
        return msgspec.structs.replace(self._text.sampling_defaults, max_tokens=limit)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        n: int = 1,
        priority: int | None = None,
    ) -> list[RequestOutput]:
        """Answer each prompt, in order: a text, `{"prompt": text}` or `{"prompt_token_ids": ids}`, or a list of those.

        `sampling_params` hold for all prompts, or are one for each (default: `get_default_sampling_params`). `n`
        answers are made for each prompt; with a seed the i-th uses seed + i. All requests are checked before anything
        runs. `use_tqdm` shows a progress bar on a terminal. Raises RequestError; a request that fails while it runs
        has `error` set instead.
        """
        return self._run(requests_of(prompts), sampling_params, use_tqdm, n, priority)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        n: int = 1,
        priority: int | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several. `chat_template` is the text of a template to use instead of the
        model's. The rest is as in `generate`."""
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        variables = {**(chat_template_kwargs or {}), **({"tools": tools} if tools is not None else {})}
        requests = [
            TextRequest(
                request_id=str(number),
                sampling=SamplingParams(),
                messages=[{**message, "content": flat_content(message.get("content"))} for message in conversation],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=variables,
            )
            for number, conversation in enumerate(conversations)
        ]
        if chat_template is None:
            return self._run(requests, sampling_params, use_tqdm, n, priority)
        own, special = self._encoder, self._text.template.special if self._text.template is not None else {}
        self._encoder = Encoder(self._text.tokenizer, ChatTemplate(chat_template, special))
        try:
            return self._run(requests, sampling_params, use_tqdm, n, priority)
        finally:
            self._encoder.close()
            self._encoder = own

    def close(self) -> None:
        """Give the model's memory back."""
        self._encoder.close()
        self._grammars.close()
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        requests: list[TextRequest],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        n: int,
        priority: int | None,
    ) -> list[RequestOutput]:
        if type(n) is not int or not 1 <= n <= 1024:
            raise RequestError(f"n is {n!r}; it must be a whole number from 1 to 1024.", param="n")
        results, jobs, commands = [], dict[int, _Job](), list[Command]()
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        for request, sampling in zip(requests, _each(given, len(requests)), strict=True):
            result, mine = self._prepare(request, sampling, n, priority)
            results.append(result)
            for job, generate in mine:
                jobs[generate.rid] = job
                commands.append(Submit(generate))
        try:
            self._finish(jobs, commands, Bar(len(jobs), show=use_tqdm))
        except BaseException:
            # An interrupted call leaves nothing behind that the next one would have to compute.
            self._engine.submit([Cancel(rid) for rid in jobs])
            raise
        return results

    def _prepare(
        self, request: TextRequest, given: SamplingParams, n: int, priority: int | None
    ) -> tuple[RequestOutput, list[tuple[_Job, GenerateRequest]]]:
        info = self._executor.info
        check_purpose(info, "")
        sampling = validate(given, vocab_size=info.vocab_size, max_logprobs=self.config.max_logprobs)
        sampling = with_bad_words(self._grammars.check_now(sampling), self._text.tokenizer.encode)
        tokens = self._encoder.encode_now(request)
        sampling = with_max_tokens(sampling, check_context(len(tokens), sampling.max_tokens, info.max_model_len))
        tokens = check_tokens(tokens, info.vocab_size)
        outputs = [CompletionOutput(index, logprobs=None if sampling.logprobs is None else []) for index in range(n)]
        prompt = request.text
        if request.messages is not None:
            prompt = self._text.tokenizer.decode(tokens, False)
        result = RequestOutput(request.request_id, prompt, tokens, outputs)
        result.prompt_logprobs = None if sampling.prompt_logprobs is None else [None]
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        jobs = []
        for output in outputs:
            decoder = AnswerDecoder(
                self._text.tokenizer,
                sampling,
                len(tokens),
                starts=request.messages is not None and not request.continue_final_message and not sampling.grammar,
                started=time.monotonic(),
            )
            generate = GenerateRequest(
                rid=next(self._rids),
                tokens=tokens,
                sampling=msgspec.structs.replace(
                    sampling,
                    seed=(seed + output.index) % 2**63,
                    prompt_logprobs=None if output.index else sampling.prompt_logprobs,
                ),
                eos_ids=() if sampling.ignore_eos and not sampling.grammar else self._text.eos_ids,
                cache=output.index > 0 or sampling.prompt_logprobs is None,
                priority=self.config.default_priority if priority is None else priority,
                urgency=request.urgency,
            )
            jobs.append((_Job(output, result, decoder), generate))
        return result, jobs

    def _finish(self, jobs: dict[int, _Job], commands: list[Command], bar: Bar) -> None:
        """Run until no job is left in `jobs`."""
        total = len(jobs)
        with bar:
            self._take(self._engine.submit(commands), jobs, refused_is_fatal=True)
            while jobs:
                stops, new_tokens = self._take([self._engine.step()], jobs)
                if stops:
                    self._engine.submit(stops)
                bar.update(total - len(jobs), new_tokens)
        settle(self._engine)

    def _take(
        self, reports: Sequence[Report], jobs: dict[int, _Job], *, refused_is_fatal: bool = False
    ) -> tuple[list[Command], int]:
        """Hand the news to their jobs. Returns what to tell the engine, and the number of new tokens."""
        stops: list[Command] = []
        count = 0
        for report in reports:
            for event in report.events if isinstance(report, Step) else ():
                job = jobs.get(event.rid)
                if job is None:
                    continue
                count += len(event.tokens)
                try:
                    over = _advance(job, event, self._text.tokenizer)
                except RopewayError as error:
                    if refused_is_fatal:
                        raise
                    job.output.finish_reason, job.owner.error, over = "error", error, True
                if over:
                    job.output.text = "".join(job.parts)
                    del jobs[event.rid]
                    job.owner.finished = all(output.finish_reason for output in job.owner.outputs)
                    if event.finish is None:
                        stops.append(Cancel(event.rid, stop=True))
        return stops, count


def _advance(job: _Job, event: TokenEvent, tokenizer: Tokenizer) -> bool:
    """Add the event's text to the job's output. Returns whether the answer is over."""
    chunk = job.decoder.take(event, time.monotonic())
    job.parts.append(chunk.text)
    job.output.token_ids += chunk.tokens
    if job.output.logprobs is not None:
        job.output.logprobs += [by_token(entry, tokenizer) for entry in chunk.logprobs]
        so_far = job.output.cumulative_logprob or 0.0
        job.output.cumulative_logprob = so_far + sum([entry.logprob for entry in chunk.logprobs])
    if job.owner.prompt_logprobs is not None:
        job.owner.prompt_logprobs += [by_token(entry, tokenizer) for entry in chunk.prompt_logprobs]
    if chunk.finish is None:
        return False
    job.output.finish_reason = str(chunk.finish)
    job.output.stop_reason = chunk.stop_reason
    if chunk.usage is not None and job.output.index == 0:
        job.owner.metrics = chunk.usage
        job.owner.num_cached_tokens = chunk.usage.cached_tokens
    return True


def _engine_config(model: str, given: Mapping[str, Any]) -> EngineConfig:
    known = {setting.name: setting for setting in settings(EngineConfig)}
    values: dict[str, Any] = {"model": model, "step_budget_ms": 0.0, "max_queue": _NO_QUEUE_LIMIT}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {close[0]!r}?"
                if close
                else "The settings are the fields of ropeway.config.EngineConfig."
            )
            raise ConfigError(f"LLM has no setting {name!r}. {hint}", param=name)
        values[name] = known[name].parse(value, f"{name} of LLM()")
    return EngineConfig(**values, **preset_values(values.get("preset"), values))


def _each(given: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(given, SamplingParams):
        return [given] * count
    if len(given) != count:
        raise RequestError(
            f"There are {len(given)} sampling_params for {count} prompts. Give one, or one for each.",
            param="sampling_params",
        )
    return list(given)
