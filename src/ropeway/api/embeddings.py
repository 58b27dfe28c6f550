"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import sys
import time
from array import array
from typing import Any

import msgspec
from starlette.requests import Request

from ropeway.api.answer import Answer
from ropeway.api.build import answer_id
from ropeway.api.embedding_schema import MAX_INPUTS, Embedding, EmbeddingList, EmbeddingRequest, PooledUsage
from ropeway.api.errors import HttpError
from ropeway.api.making import Choice
from ropeway.api.parse import Refused, decode, ignored_header
from ropeway.api.prompts import parse_prompts
from ropeway.api.state import api_of, read_body
from ropeway.api.vectors import PooledAnswer, common, served, tokenized
from ropeway.errors import RequestError
from ropeway.service.request import TextRequest
from ropeway.service.vectors import check_dimensions, finished

_NULL = b"null"
REFUSED: Refused = {
    "messages": ((_NULL,), "Conversations have no embedding; render them with /tokenize and send the tokens."),
    "embed_dtype": ((_NULL, b'"float32"'), "Vectors are sent as float32."),
    "endianness": ((_NULL, b'"native"', b'"little"'), "Vectors are sent in little-endian order."),
    "padding": ((_NULL, b'"do_not_pad"'), "Inputs are never padded."),
    "mm_processor_kwargs": ((_NULL, b"{}"), "This model reads only text."),
}


async def embeddings(request: Request) -> Answer:
    """Make a vector of each input."""
    api = api_of(request)
    api.check_open()
    body, ignored = decode(EmbeddingRequest, await read_body(request), REFUSED)
    api.check_model(body.model)
    inputs = parse_inputs(body.input, api.service.max_model_len if body.truncate_prompt_tokens is None else None)
    info, pooling = served(api)
    if pooling.judges:
        message = f"{info.model} is a cross-encoder, which makes no vectors: it scores pairs. Use /v1/score."
        raise RequestError(message, param="model")
    if body.normalize is not None and body.use_activation not in (None, body.normalize):
        raise RequestError("normalize and use_activation say the same; send one of them.", param="use_activation")
    check_dimensions(body.dimensions, pooling, api.service.model_name)
    kind = body.pooling or pooling.kind
    wanted = [
        TextRequest(
            **common(request, api, body),
            **one,
            add_special_tokens=body.add_special_tokens,
            truncate=body.truncate_prompt_tokens,
            truncate_left=body.truncation_side == "left",
            pooling=kind,
            # The mean needs every position, the first token's vector the first one: a cache would hold them back.
            cache=kind == "last",
        )
        for one in inputs
    ]
    choices = [Choice(one, number, number) for number, one in enumerate(await tokenized(api, wanted, "input"))]
    normalize = next((asked for asked in (body.normalize, body.use_activation) if asked is not None), pooling.normalize)
    written = [msgspec.Raw()] * len(choices)
    name, created = answer_id("embd"), int(time.time())

    def take(choice: Choice, raw: bytes) -> None:
        vector = finished(raw, dimensions=body.dimensions, normalize=normalize)
        written[choice.index] = write(vector, as_text=body.encoding_format == "base64")

    def whole(usage: PooledUsage) -> EmbeddingList:
        data = [Embedding(index=index, embedding=one) for index, one in enumerate(written)]
        return EmbeddingList(id=name, created=created, model=api.service.model_name, data=data, usage=usage)

    return PooledAnswer(api, choices, take, whole, name, ignored_header(ignored))


def parse_inputs(raw: msgspec.Raw, longest: int | None) -> list[dict[str, Any]]:
    """The inputs as fields of TextRequest. Raises RequestError (400)."""
    inputs = parse_prompts(raw, "input", longest, MAX_INPUTS)
    if len(inputs) > MAX_INPUTS:
        message = f"There are {len(inputs)} inputs; at most {MAX_INPUTS} are accepted in one request. Split it."
        raise HttpError(400, message, param="input")
    for number, one in enumerate(inputs if len(inputs) > 1 else ()):
        if not (one.get("text") or one.get("tokens")):
            name = f"input[{number}]"
            raise RequestError(f"{name} is empty; send at least one character or token id.", param=name)
    return inputs


def write(vector: array[float], *, as_text: bool) -> msgspec.Raw:
    """A vector in JSON: its numbers, with as many digits as a float32 has, or its bytes in little-endian order."""
    if not as_text:
        return msgspec.Raw(b"[" + ",".join(map("{:.9g}".format, vector)).encode() + b"]")
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return msgspec.Raw(b'"' + base64.b64encode(vector.tobytes()) + b'"')
