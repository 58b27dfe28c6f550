"""`/admin/deployments`: which models and servers stand behind the routes, and how they do."""

from __future__ import annotations

import logging
from typing import Literal, Protocol

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ropeway.api.errors import HttpError
from ropeway.api.health import json_response

_log = logging.getLogger(__name__)


class DeploymentState(Struct, frozen=True, kw_only=True):
    """A deployment: a model of this server (`local`), or another server.

    `phase` says whether a model is in memory: stopped, starting, ready, stopping, failed. Where it takes no requests,
    `reason` says why. `circuit` is closed while it answers well, open while it gets none, half_open while one request
    tries whether it answers again. `requests` counts those that were sent to it, by what became of them.
    """

    name: str
    kind: Literal["local", "remote"]
    model: str
    phase: str
    routes: list[str]
    takes_requests: bool
    reason: str | None
    circuit: str
    in_flight: int
    requests: dict[str, int]
    memory_gib: float | None


class DeploymentList(Struct, frozen=True, kw_only=True):
    """All of them, and the memory that local models may take together and that those in memory have been given."""

    object: Literal["list"] = "list"
    data: list[DeploymentState]
    memory_gib: float | None
    memory_used_gib: float | None


class Deployments(Protocol):
    """What the endpoints need of whoever keeps the deployments. Raises HttpError (404) for an unknown name."""

    def states(self) -> DeploymentList: ...

    async def start(self, name: str) -> DeploymentState: ...

    async def stop(self, name: str) -> DeploymentState: ...


async def list_deployments(request: Request) -> Response:
    """How the deployments do."""
    return json_response(_deployments(request).states())


async def start_deployment(request: Request) -> Response:
    """Take a deployment into service. A model that is not in memory is loaded, if there is room."""
    name = str(request.path_params["name"])
    state = await _deployments(request).start(name)
    _log.info("%s: deployment %s is taken into service", request.state.request_id, state.name)
    return json_response(state)


async def stop_deployment(request: Request) -> Response:
    """Take a deployment out of service. Requests that it is answering finish; then its model leaves memory."""
    name = str(request.path_params["name"])
    state = await _deployments(request).stop(name)
    _log.info("%s: deployment %s is taken out of service", request.state.request_id, state.name)
    return json_response(state)


def _deployments(request: Request) -> Deployments:
    found: Deployments | None = getattr(request.app.state, "deployments", None)
    if found is None:
        message = "This server has one model and no routes. Start it with --routes to have deployments."
        raise HttpError(404, message, code="no_routes")
    return found
