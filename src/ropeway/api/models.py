"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ropeway.accounts.meter import check_model
from ropeway.api.health import json_response
from ropeway.api.schema import ModelCard, ModelList
from ropeway.api.state import Api, api_of, unknown_model


def cards(api: Api) -> list[ModelCard]:
    """What is served."""
    if api.cards is not None:
        return api.cards()
    service, info = api.service, api.service.info
    root = info.model if info is not None else service.model_name
    return [ModelCard(id=service.model_name, created=api.created, root=root, max_model_len=service.max_model_len)]


async def list_models(request: Request) -> Response:
    """The served models."""
    account = request.state.account
    known = [card for card in cards(api_of(request)) if account is None or account.allows(card.id)]
    return json_response(ModelList(data=known))


async def get_model(request: Request) -> Response:
    """One model; 404 for a name that is not served."""
    api, name = api_of(request), request.path_params["model"]
    if request.state.account is not None:
        check_model(request.state.account, name)
    found = next((card for card in cards(api) if card.id == name), None)
    if found is None:
        raise unknown_model(name, [card.id for card in cards(api)])
    return json_response(found)
