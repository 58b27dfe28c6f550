"""`/admin/keys`: who may use this server, and how much of it."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from ropeway.accounts import Account, Accounts, Limits
from ropeway.api.errors import HttpError
from ropeway.api.health import json_response
from ropeway.api.parse import decode, ignored_header
from ropeway.api.state import read_body

_log = logging.getLogger(__name__)
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]


class KeyRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /admin/keys. With its first key a server is closed: from then on nobody comes in without one."""

    name: Annotated[Name, Meta(description="What to call it; no other key that is not revoked has that name.")]
    tenant: Annotated[Name | None, Meta(description="Whose it is; by default each key is its own tenant.")] = None
    expires: Annotated[
        Annotated[int, Meta(ge=0, lt=2**53)] | None, Meta(description="Its end, in seconds since 1970.")
    ] = None
    limits: Limits | None = None


class KeyMade(Struct, frozen=True, kw_only=True):
    """A new key. `key` is what clients send, and is never told again."""

    key: str
    account: Account


class KeyList(Struct, frozen=True, kw_only=True):
    """All keys that were made for this server, the oldest first, revoked ones too. `required`: nobody comes in without
    one."""

    object: Literal["list"] = "list"
    data: list[Account]
    required: bool


async def list_keys(request: Request) -> Response:
    """What each key may do, without the keys themselves."""
    accounts = _accounts(request)
    return json_response(KeyList(data=await accounts.every(), required=await accounts.required()))


async def create_key(request: Request) -> Response:
    """Make a key, and tell it this once."""
    body, ignored = decode(KeyRequest, await read_body(request), {})
    secret, account = await _accounts(request).create(
        body.name, body.limits or Limits(), tenant=body.tenant or "", expires=body.expires
    )
    _log.info("%s: key %s, named %s, is made", request.state.request_id, account.id, account.name)
    response = json_response(KeyMade(key=secret, account=account))
    response.headers.update({**ignored_header(ignored), "cache-control": "no-store"})
    return response


async def revoke_key(request: Request) -> Response:
    """End a key for good, by its id. What it has under way goes on."""
    id = str(request.path_params["key_id"])
    account = await _accounts(request).revoke(id)
    if account is None:
        shown = id if len(id) <= 64 and id.isprintable() else "of that id"
        raise HttpError(404, f"There is no key {shown}. GET /admin/keys lists all.", code="key_not_found", param="id")
    _log.info("%s: key %s, named %s, is revoked", request.state.request_id, account.id, account.name)
    return json_response(account)


def _accounts(request: Request) -> Accounts:
    accounts = request.app.state.accounts
    assert isinstance(accounts, Accounts)
    return accounts
