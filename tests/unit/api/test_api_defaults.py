"""Where a request says nothing, the model's own settings hold, as in vLLM."""

from __future__ import annotations

import msgspec

from ropeway.api.build import sampling_params
from ropeway.api.schema import CompletionRequest
from ropeway.contract import SamplingParams
from ropeway.service.loader import ModelText
from ropeway.text.tokenizer import ByteTokenizer

MODEL = ModelText(
    name="m", tokenizer=ByteTokenizer(), template=None, eos_ids=(1,), context_limit=8,
    generation={"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "pad_token_id": 3},
)  # fmt: skip


def test_a_checkpoints_generation_config_fills_what_a_request_leaves_open() -> None:
    body = msgspec.json.decode(b'{"prompt": "x", "top_k": 5, "min_p": null}', type=CompletionRequest)
    assert sampling_params(body, 7, MODEL.sampling_defaults) == SamplingParams(temperature=0.6, top_k=5, max_tokens=7)


def test_zero_is_said_and_not_missing() -> None:
    body = msgspec.json.decode(b'{"prompt": "x", "temperature": 0, "top_k": 0}', type=CompletionRequest)
    assert sampling_params(body, 7, MODEL.sampling_defaults) == SamplingParams(temperature=0.0, top_k=0, max_tokens=7)
