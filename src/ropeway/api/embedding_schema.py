"""What /v1/embeddings, /v1/score and /v1/rerank take and answer. Names are OpenAI's, vLLM's and Cohere's."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Raw, Struct

from ropeway.api.schema import CALLBACK, DEFERRED, PRIORITY, CallbackUrl, Label, Milliseconds, Model, Priority

MAX_INPUTS: Final = 2048
"""Texts in one body, as at OpenAI."""

MAX_INPUT_TOKENS: Final = 300_000
"""Their tokens in all, as at OpenAI."""

_INT32 = 2**31
_TOKEN_ID: dict[str, Any] = {"type": "integer", "minimum": 0}
Limit = Annotated[int, Meta(ge=0, lt=_INT32)]
Inputs = Annotated[
    Raw,
    Meta(
        description=f"Text, a list of texts, token ids, or a list of lists of token ids; at most {MAX_INPUTS}.",
        extra_json_schema={
            "oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUTS},
                {"type": "array", "items": _TOKEN_ID, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": _TOKEN_ID, "minItems": 1},
                    "minItems": 1,
                    "maxItems": MAX_INPUTS,
                },
            ]
        },
    ),
]
Texts = Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]


class PooledFields(Struct, frozen=True, kw_only=True):
    """What all three take."""

    model: Model = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, lt=_INT32)] | None,
        Meta(description="Keep so many tokens of a longer input; -1: as many as the model takes. Else that is a 400."),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Meta(description="Which end of an input is cut off (default: right).")
    ] = None
    priority: Annotated[Priority | None, Meta(description=PRIORITY)] = None
    deferred: Annotated[bool | None, Meta(description=DEFERRED)] = None
    background: Annotated[bool | None, Meta(description="Another word for `deferred`.")] = None
    callback_url: Annotated[CallbackUrl | None, Meta(description=CALLBACK)] = None
    deadline_ms: Annotated[
        Milliseconds | None, Meta(description="Time for the whole answer, after which it ends with a timeout.")
    ] = None
    cache_salt: Annotated[
        Label | None, Meta(description="Requests share cached prefixes only with requests of the same salt.")
    ] = None


class EmbeddingRequest(PooledFields, frozen=True, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: Inputs
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="A list of numbers (default), or float32 in little-endian order as base64."),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, lt=_INT32)] | None,
        Meta(description="Keep so many numbers of each vector, for models that are trained for that."),
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Let the tokenizer add its marks to texts (default: true).")
    ] = None
    pooling: Annotated[
        Literal["last", "mean", "cls"] | None,
        Meta(
            description="The vector is that of the last token, the mean, or that of the first (default: the model's)."
        ),
    ] = None
    normalize: Annotated[
        bool | None, Meta(description="Bring vectors to the length 1 (default: as the model was trained).")
    ] = None
    use_activation: Annotated[bool | None, Meta(description="vLLM's name for `normalize`.")] = None


class ScoreRequest(PooledFields, frozen=True, kw_only=True):
    """Body of POST /v1/score: two sides under one of the pairs of names. One text on the left meets each on the right;
    otherwise both sides have the same number."""

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    items: str | Texts | None = None
    data_1: str | Texts | None = None
    data_2: str | Texts | None = None
    max_tokens_per_query: Annotated[Limit | None, Meta(description="Cut texts on the left to so many tokens.")] = None
    max_tokens_per_doc: Annotated[Limit | None, Meta(description="Cut texts on the right to so many tokens.")] = None


class RerankText(Struct, frozen=True):
    text: str


class RerankRequest(PooledFields, frozen=True, kw_only=True):
    """Body of POST /v1/rerank."""

    query: str
    documents: Annotated[list[str | RerankText], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[Limit | None, Meta(description="Answer with so many of the best; 0 and null: with all.")] = None
    return_documents: Annotated[bool | None, Meta(description="Repeat the documents' texts (default: true).")] = None
    max_tokens_per_query: Annotated[Limit | None, Meta(description="Cut the query to so many tokens.")] = None
    max_tokens_per_doc: Annotated[Limit | None, Meta(description="Cut documents to so many tokens.")] = None


class PooledUsage(Struct, frozen=True):
    """Tokens read; there are no others."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True, kw_only=True):
    """One vector. `embedding` is a list of numbers, or a string under `encoding_format: base64`."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        Raw, Meta(extra_json_schema={"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]})
    ]


class EmbeddingList(Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: PooledUsage


class Score(Struct, frozen=True, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/score, in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PooledUsage


class Ranked(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`index` is the document's place in the request."""

    index: int
    relevance_score: float
    document: RerankText | None = None


class RerankList(Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/rerank, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PooledUsage
