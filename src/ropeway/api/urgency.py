"""How a request says who waits for its answer: a header, a word for a priority, or a service tier.

The header `x-ropeway-priority` wins over the body, so that a gateway can decide for clients it does not trust to.
"""

from __future__ import annotations

from typing import Final, Literal

from starlette.requests import Request

from ropeway.api.errors import HttpError
from ropeway.contract import Urgency

HEADER: Final = "x-ropeway-priority"
Word = Literal["high", "medium", "low"]
Tier = Literal["auto", "batch", "default", "flex", "priority", "scale"]

WORDS: Final[dict[str, Urgency]] = {urgency.name.lower(): urgency for urgency in Urgency}
TIERS: Final[dict[str, Urgency]] = {
    "auto": Urgency.HIGH,
    "default": Urgency.HIGH,
    "priority": Urgency.HIGH,
    "scale": Urgency.HIGH,
    "flex": Urgency.MEDIUM,
    "batch": Urgency.LOW,
}


def from_header(value: bytes) -> Urgency | None:
    """None if the header was not sent. Raises HttpError (400) for a word that is none."""
    if not value:
        return None
    found = WORDS.get(value.decode("latin-1").strip().lower())
    if found is None:
        message = f"{HEADER} must be one of {', '.join(WORDS)}."
        raise HttpError(400, message, code="invalid_priority", param=HEADER)
    return found


def said(known: Urgency | None, priority: object = None, tier: object = None) -> Urgency | None:
    """What a request says: `known` is the header's word. None if it says nothing that matters; `auto` and `default` are
    what clients send who do not care."""
    if known is not None:
        return known
    if isinstance(priority, str):
        return WORDS.get(priority)
    return TIERS.get(tier) if isinstance(tier, str) and tier not in ("auto", "default") else None


def urgency_of(request: Request, priority: object = None, tier: object = None) -> Urgency:
    """Of a request that is answered now: HIGH unless it says otherwise. `priority` and `tier` are its body's."""
    found = said(getattr(request.state, "urgency", None), priority, tier)
    return Urgency.HIGH if found is None else found


def in_background(known: Urgency | None, priority: object = None, tier: object = None) -> Urgency:
    """Of work that nobody waits for: LOW if it says so, MEDIUM otherwise."""
    found = said(known, priority, tier)
    return Urgency.MEDIUM if found is None else max(found, Urgency.MEDIUM)


def place_of(priority: int | str | None) -> int | None:
    """The priority inside a class, vLLM's number; None if the field has a word or nothing."""
    return priority if isinstance(priority, int) else None
