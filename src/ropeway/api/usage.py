"""GET /v1/usage: what a key has used, or the administrator all keys, and what it has cost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final, Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ropeway.accounts import Account, Accounts
from ropeway.accounts.table import as_csv
from ropeway.accounts.usage import COLUMNS, Query, UsageRow, day
from ropeway.api import lists
from ropeway.api.health import json_response
from ropeway.api.state import jobs_of
from ropeway.errors import RequestError

MAX_ROWS: Final = 10_000
_DEFAULT_ROWS = 1000
_BY = "key,model,day"
_SECONDS = re.compile(r"[0-9]{1,11}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

_TIME = {"type": "string", "pattern": f"^({_DATE.pattern}|{_SECONDS.pattern})$"}
_COLUMN = f"({'|'.join(COLUMNS)})"
PARAMETERS: Final = [
    {"name": "by", "in": "query", "schema": {"type": "string", "pattern": f"^{_COLUMN}(,{_COLUMN}){{0,5}}$"}},
    {"name": "since", "in": "query", "schema": _TIME},
    {"name": "until", "in": "query", "schema": _TIME},
    lists.bound(_DEFAULT_ROWS, MAX_ROWS),
    {"name": "format", "in": "query", "schema": {"enum": ["json", "csv"]}},
]


class UsageList(Struct, frozen=True, kw_only=True):
    """Rows in the order of time, key, tenant, model. `has_more`: there are more than were asked for. `cost` is in units
    of `currency`."""

    object: Literal["list"] = "list"
    currency: str
    data: list[UsageRow]
    has_more: bool


def with_csv(entry: dict[str, Any]) -> dict[str, Any]:
    """The route's entry in the OpenAPI description, with its other format."""
    entry["responses"]["200"]["content"]["text/csv"] = {"schema": {"type": "string"}}
    return entry


async def get_usage(request: Request) -> Response:
    """Tokens and cost by key, tenant, model and time. A key sees what it has used itself, the administrator all."""
    given = request.query_params
    shape = given.get("format", "json")
    if shape not in ("json", "csv"):
        raise RequestError("format must be json or csv.", param="format")
    query = Query(
        by=_columns(given.get("by", _BY)),
        since=_time(given.get("since"), "since"),
        until=_time(given.get("until"), "until"),
        limit=lists.limit(request, _DEFAULT_ROWS, MAX_ROWS),
    )
    accounts = request.app.state.accounts
    assert isinstance(accounts, Accounts)
    await jobs_of(request).entered()
    rows = await accounts.usage(_own(request, query))
    if shape == "csv":
        return Response(as_csv(rows[: query.limit], query.by), media_type="text/csv")
    more = len(rows) > query.limit
    return json_response(UsageList(currency=accounts.prices.currency, data=rows[: query.limit], has_more=more))


def _own(request: Request, query: Query) -> Query:
    """Without what is not the caller's."""
    if request.state.operator:
        return query
    account: Account | None = request.state.account
    if account is not None:
        return replace(query, key=account.id)
    return replace(query, key="", tenant=str(request.state.tenant))


def _columns(text: str) -> list[str]:
    names = text.split(",")
    if len(names) > len(COLUMNS) or not all(name in COLUMNS for name in names):
        raise RequestError(f"by must be some of {', '.join(COLUMNS)}, with commas between them.", param="by")
    return names


def _time(text: str | None, param: str) -> int | None:
    """Unix seconds of a day's beginning (UTC), or as they are."""
    if text is None:
        return None
    if _SECONDS.fullmatch(text):
        return int(text)
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        return day(text)
    except ValueError:
        raise RequestError(f"{param} must be a day such as 2026-11-30, or Unix seconds.", param=param) from None
