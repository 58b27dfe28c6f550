"""How OpenAI's two completion endpoints answer: the same envelope around what their choices say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from ropeway.api import sse
from ropeway.api.answer import Plan
from ropeway.api.build import answer_id, service_tier
from ropeway.api.making import Choice, Making
from ropeway.api.replies import ChatCompletion, Completion
from ropeway.api.schema import CommonFields
from ropeway.api.state import Api


def completion_plan(
    api: Api,
    body: CommonFields,
    choices: list[Choice],
    shape: sse.Shape,
    members: Callable[[Making], dict[str, Any]],
    *,
    kind: type[ChatCompletion] | type[Completion],
    chunk: str,
    prefix: str,
) -> Plan:
    """The plan for `choices`. `members` are those of an unstreamed answer of type `kind` besides the envelope's;
    `chunk` is the object type of a streamed one's parts, `prefix` begins the answer's id."""
    name, created, model = answer_id(prefix, body.request_id), int(time.time()), api.service.model_name
    fingerprint, tier = api.fingerprint, service_tier(body)

    def whole(making: Making) -> bytes:
        answer = kind(
            id=name,
            created=created,
            model=model,
            usage=making.usage(),
            system_fingerprint=fingerprint,
            service_tier=tier,
            **members(making),
        )
        return msgspec.json.encode(answer)

    head = {"id": name, "object": chunk, "created": created, "model": model, "system_fingerprint": fingerprint}
    head |= {"service_tier": tier} if tier else {}
    return Plan(choices, whole, sse.Chunks.of(head, shape, body) if body.stream else None, answer_id=name)
