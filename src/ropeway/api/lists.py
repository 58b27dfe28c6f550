"""The query of a list that is read page by page, and its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

from msgspec import Struct
from starlette.requests import Request

from ropeway.errors import RequestError

Order = Literal["asc", "desc"]


T = TypeVar("T", bound=Struct)


class Listing(Struct, Generic[T], frozen=True, kw_only=True):
    """A page of a list. `has_more`: there are others behind it."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[T], *, more: bool) -> Self:
        """Entries with an `id`."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)  # type: ignore[attr-defined]
        return cls(data=data, first_id=first, last_id=last, has_more=more)


@dataclass(frozen=True)
class Query:
    """`limit` entries beyond the one whose id is `after`, by creation."""

    after: str | None
    limit: int
    order: Order


def parameters(default: int, most: int, *, order: bool = True) -> list[dict[str, Any]]:
    """The description of such a query."""
    found: list[dict[str, Any]] = [{"name": "after", "in": "query", "schema": {"type": "string"}}, bound(default, most)]
    if order:
        found.append({"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}})
    return found


def bound(default: int, most: int) -> dict[str, Any]:
    """The description of a query's `limit`."""
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"name": "limit", "in": "query", "schema": schema}


def limit(request: Request, default: int, most: int) -> int:
    """The `limit` of a query. Raises RequestError."""
    given = request.query_params.get("limit")
    if given is None:
        return default
    found = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
    if not 1 <= found <= most:
        raise RequestError(f"limit must be a whole number from 1 to {most}.", param="limit")
    return found


def query(request: Request, default: int, most: int) -> Query:
    """Raises RequestError."""
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc.", param="order")
    found: Order = "asc" if order == "asc" else "desc"
    return Query(request.query_params.get("after"), limit(request, default, most), found)
