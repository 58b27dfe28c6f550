"""Beam search without a server: `LLM.beam_search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropeway.contract import GenerateRequest, SamplingParams
from ropeway.service.beam import Search, check, one_token, shown_tokens
from ropeway.service.context import check_context
from ropeway.service.offline import CompletionOutput, RequestOutput, by_token, run_all
from ropeway.service.params import check_tokens, validate
from ropeway.service.prompts import Parts, requests_of


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What `LLM.beam_search` is asked for. Names and meanings are vLLM's, but that the length is the answer's alone,
    with the token that ends it."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


class Beams(Parts):
    """The part of an `LLM` that searches by beams."""

    def beam_search(self, prompts: Any, params: BeamSearchParams) -> list[RequestOutput]:
        """The `beam_width` best answers to each prompt as its `outputs`, best first. `prompts` are as in `generate`.
        `max_tokens` may be -1 for as many as the context has room for. Raises RequestError."""
        info = self._executor.info
        wish = SamplingParams(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            stop_token_ids=params.stop_token_ids,
            logprobs=params.logprobs,
        )
        sampling = validate(wish, vocab_size=info.vocab_size, max_logprobs=self.config.max_logprobs)
        check(sampling, params.beam_width, params.length_penalty)
        results: list[RequestOutput] = []
        searches: list[Search] = []
        for request in requests_of(prompts):
            tokens = check_tokens(self._encoder.encode_now(request), info.vocab_size)
            search = Search(
                params.beam_width,
                params.length_penalty,
                check_context(len(tokens), sampling.max_tokens, info.max_model_len),
                ends=() if sampling.ignore_eos else self._text.eos_ids,
                stops=sampling.stop_token_ids,
                min_tokens=sampling.min_tokens,
                keep=sampling.logprobs or 0,
            )
            searches.append(search)
            results.append(RequestOutput(request.request_id, request.text, tokens, [], finished=True))
        while any(search.open for search in searches):
            self._advance(searches, [result.prompt_token_ids for result in results])
        for result, search in zip(results, searches, strict=True):
            result.outputs = self._outputs(search, sampling)
        return results

    def _advance(self, searches: Sequence[Search], prompts: Sequence[list[int]]) -> None:
        """One token for every open beam of all searches."""
        asked = [
            GenerateRequest(
                rid=next(self._rids),
                tokens=prompt + beam.tokens,
                sampling=one_token(search.count),
                priority=self.config.default_priority,
            )
            for search, prompt in zip(searches, prompts, strict=True)
            for beam in search.open
        ]
        told = iter(run_all(self._engine, asked))
        for search in searches:
            extras = [next(told).extra for _ in search.open]
            if extras:
                search.advance([extra.logprobs[0] for extra in extras if extra is not None])

    def _outputs(self, search: Search, sampling: SamplingParams) -> list[CompletionOutput]:
        tokenizer = self._text.tokenizer

        def text(tokens: list[int]) -> str:
            decoder = tokenizer.decoder(starts=False)
            return decoder.push(tokens) + decoder.flush()

        return [
            CompletionOutput(
                index,
                text=text(shown_tokens(beam, sampling)),
                token_ids=beam.tokens,
                cumulative_logprob=beam.cumulative_logprob,
                logprobs=None if sampling.logprobs is None else [by_token(entry, tokenizer) for entry in beam.logprobs],
                finish_reason=str(beam.finish),
                stop_reason=beam.stop_reason,
            )
            for index, beam in enumerate(search.results())
        ]
