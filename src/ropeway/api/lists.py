"""The query of a list that is read page by page, and its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request

from ropeway.errors import RequestError

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Query:
    """`limit` entries beyond the one whose id is `after`, by creation."""

    after: str | None
    limit: int
    order: Order


def parameters(default: int, most: int, *, order: bool = True) -> list[dict[str, Any]]:
    """The description of such a query."""
    found: list[dict[str, Any]] = [
        {"name": "after", "in": "query", "schema": {"type": "string"}},
        {
            "name": "limit",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "maximum": most, "default": default},
        },
    ]
    if order:
        found.append({"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}})
    return found


def query(request: Request, default: int, most: int) -> Query:
    """Raises RequestError."""
    given, order = request.query_params.get("limit"), request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc.", param="order")
    limit = default
    if given is not None:
        limit = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
        if not 1 <= limit <= most:
            raise RequestError(f"limit must be a whole number from 1 to {most}.", param="limit")
    return Query(request.query_params.get("after"), limit, "asc" if order == "asc" else "desc")
