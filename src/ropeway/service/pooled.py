"""Vectors and scores without a server: `LLM(model).embed(texts)` and `LLM(model).score(query, texts)`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ropeway.contract import (
    GenerateRequest,
    Pooling,
    SamplingParams,
    TokenEvent,
)
from ropeway.errors import RequestError
from ropeway.service.context import check_input, check_purpose
from ropeway.service.offline import run_all
from ropeway.service.params import check_tokens
from ropeway.service.prompts import Parts, requests_of
from ropeway.service.request import TextRequest
from ropeway.service.vectors import check_dimensions, cosine, finished, paired

_KINDS = ("last", "mean", "cls")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How to make vectors; None is the model's own way. `dimensions` keeps the first numbers of each, `pooling` is
    "last", "mean" or "cls", `use_activation` (vLLM's name) brings vectors to the length 1."""

    dimensions: int | None = None
    use_activation: bool | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """The vector of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int] = field(repr=False)
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    """The score of one pair. `prompt_token_ids` are the pair's as a cross-encoder reads it, or those of both texts."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int] = field(repr=False)
    finished: bool = True


class Pools(Parts):
    """The part of an `LLM` that makes vectors."""

    def embed(
        self,
        prompts: Any,
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        priority: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector of each prompt, in order. `prompts` are as in `generate`. Longer ones are cut to their first
        `truncate_prompt_tokens` tokens (-1: as many as the model takes), or refused without. Raises RequestError."""
        pooling, params = self._pooling(), pooling_params or PoolingParams()
        if pooling.judges:
            raise RequestError(f"{self._executor.info.model} is a cross-encoder: it makes no vectors. Use score().")
        if params.pooling not in (None, *_KINDS):
            raise RequestError(
                f"pooling is {params.pooling!r}; it must be one of {', '.join(_KINDS)}.", param="pooling"
            )
        check_dimensions(params.dimensions, pooling, self._executor.info.model)
        requests = [replace(one, truncate=truncate_prompt_tokens) for one in requests_of(prompts)]
        prompts = [self._encoder.encode_now(one, self._executor.info.max_model_len) for one in requests]
        events = self._compute([(tokens, 0) for tokens in prompts], params.pooling or pooling.kind, use_tqdm, priority)
        normalize = pooling.normalize if params.use_activation is None else params.use_activation
        found = []
        for number, (tokens, event) in enumerate(zip(prompts, events, strict=True)):
            vector = finished(_vector(event), dimensions=params.dimensions, normalize=normalize)
            output = EmbeddingOutput(vector.tolist())
            found.append(EmbeddingRequestOutput(str(number), output, tokens, num_cached_tokens=event.cached_tokens))
        return found

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        priority: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each text of `data_2` answers the one of `data_1`, or the one at its place in it: as a cross-encoder
        says, or else the cosine of the two vectors. Raises RequestError."""
        left = [data_1] if isinstance(data_1, str) else list(data_1)
        right = [data_2] if isinstance(data_2, str) else list(data_2)
        pairs, pooling, longest = paired(left, right), self._pooling(), self._executor.info.max_model_len
        scores: list[float]
        if pooling.judges:
            most = longest if truncate_prompt_tokens == -1 else truncate_prompt_tokens
            joined = [self._text.tokenizer.encode_pair(left[i], right[j], most) for i, j in pairs]
            events = self._compute(joined, pooling.kind, use_tqdm, priority)
            scores = [array("f", _vector(event))[0] for event in events]
            prompts = [tokens for tokens, _ in joined]
        else:
            requests = [
                TextRequest(request_id="", sampling=SamplingParams(), text=text, truncate=truncate_prompt_tokens)
                for text in left + right
            ]
            texts = [self._encoder.encode_now(one, longest) for one in requests]
            events = self._compute([(tokens, 0) for tokens in texts], pooling.kind, use_tqdm, priority)
            vectors = [finished(_vector(event)) for event in events]
            scores = [cosine(vectors[i], vectors[len(left) + j]) for i, j in pairs]
            prompts = [texts[i] + texts[len(left) + j] for i, j in pairs]
        return [
            ScoringRequestOutput(str(number), ScoringOutput(score), tokens)
            for number, (score, tokens) in enumerate(zip(scores, prompts, strict=True))
        ]

    def _pooling(self) -> Pooling:
        info = self._executor.info
        check_purpose(info, "last")
        assert info.pooling is not None, "check_purpose() has looked"
        return info.pooling

    def _compute(
        self, prompts: Sequence[tuple[list[int], int]], kind: str, use_tqdm: bool, priority: int | None
    ) -> list[TokenEvent]:
        """The last event of each prompt, given with where its second text begins. All are checked before one runs."""
        info = self._executor.info
        requests = []
        for tokens, second in prompts:
            check_input(len(tokens), info.max_model_len)
            requests.append(
                GenerateRequest(
                    rid=next(self._rids),
                    tokens=check_tokens(tokens, info.vocab_size),
                    sampling=SamplingParams(temperature=0.0, max_tokens=1),
                    priority=self.config.default_priority if priority is None else priority,
                    cache=kind == "last",
                    pooling=kind,
                    second=second,
                )
            )
        return run_all(self._engine, requests, show=use_tqdm)


def _vector(event: TokenEvent) -> bytes:
    assert event.extra is not None, "the last event of such a request has its vector"
    return event.extra.vector
