"""A server with a table of routes, put together: deployments, their supervisor, the router before them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from ropeway.api.app import create_app
from ropeway.api.deployments import DeploymentList, DeploymentState
from ropeway.api.errors import HttpError
from ropeway.api.schema import ModelCard
from ropeway.config import ServerConfig
from ropeway.errors import RopewayError
from ropeway.gateway.canaries import Canaries
from ropeway.gateway.choice import Way
from ropeway.gateway.deployment import Backend, Deployment, LocalBackend, RemoteBackend
from ropeway.gateway.families import families
from ropeway.gateway.front import FrontService
from ropeway.gateway.local import LocalModel
from ropeway.gateway.proxy import Proxy
from ropeway.gateway.router import Router
from ropeway.gateway.supervisor import Place, Supervisor
from ropeway.gateway.table import Local, Remote, Table
from ropeway.observe.metrics import Metrics
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """A local model with its application: what the supervisor keeps in memory."""

    app: ASGIApp
    model: LocalModel

    @property
    def service(self) -> TextService:
        return self.model.service

    @property
    def gone(self) -> asyncio.Future[RopewayError | None]:
        return self.model.gone

    @property
    def idle(self) -> bool:
        return self.model.idle

    async def stop(self) -> None:
        await self.model.end()


class Fleet:
    """All that answers on a server with `table`. `command` starts an engine process. Lives on one event loop.

    `gone` is done with the error if a model that starts with the server does not: an operator who has just typed it in
    wants to know at once. Later failures take one deployment out of service, not the server.
    """

    def __init__(self, table: Table, server: ServerConfig, command: Sequence[str]) -> None:
        self.table = table
        self.deployments: dict[str, Deployment] = {}
        self.service = FrontService(next(iter(table.routes)), self.deployments)
        self.metrics = Metrics(None)
        self.gone: asyncio.Future[RopewayError | None] = asyncio.get_running_loop().create_future()
        targets = {route.name: list(route.targets) for route in table.routes.values()}
        self.canaries = Canaries(server.data_path / "canary.db", targets, table.deployments)
        self._command = command
        self._ways = {name: Way(route) for name, route in table.routes.items()}
        local = {name: spec for name, spec in table.deployments.items() if isinstance(spec, Local)}
        self._places = {name: self._place(name, spec, number) for number, (name, spec) in enumerate(local.items())}
        self._supervisor = Supervisor(self._places.values(), budget=table.memory_gib, patience=table.start_timeout)
        self._proxies: list[Proxy] = []
        self._front: FastAPI
        self._opening: asyncio.Task[None] | None = None

    def install(self, app: FastAPI) -> None:
        """Put the router between the gate of `app`, the server's own application, and its routes, and begin to load
        what starts with the server."""
        self._front, api = app, app.state.api
        api.cards = self.cards
        api.services = self.service.services
        for name, spec in self.table.deployments.items():
            backend: Backend
            if isinstance(spec, Remote):
                proxy = Proxy(name, spec, api)
                self._proxies.append(proxy)
                backend = RemoteBackend(spec, proxy)
            else:
                backend = LocalBackend(self._places[name], self._supervisor)
            self.deployments[name] = Deployment(name, backend)
        self.metrics.include(lambda: families(self.deployments.values(), self._ways.values()))
        app.state.deployments = self
        app.state.canaries = self.canaries
        router = Middleware(
            Router,
            table=self.table,
            deployments=self.deployments,
            ways=self._ways,
            api=api,
            splitter_of=self.canaries.splitter,
        )
        app.user_middleware.append(router)  # the innermost: what stands there has passed the gate
        self._opening = asyncio.create_task(self._open())

    async def ready(self) -> None:
        """Returns when the deployments that start with the server have done so. Raises what has kept one from it."""
        assert self._opening is not None
        await asyncio.shield(self._opening)

    async def close(self) -> None:
        """End all engines and connections."""
        if self._opening is not None:
            self._opening.cancel()
        await self._supervisor.close()
        for proxy in self._proxies:
            await proxy.close()
        await self.canaries.close()
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)

    def cards(self) -> list[ModelCard]:
        """The public names, for /v1/models."""
        found = []
        for route in self.table.routes.values():
            spec, service = self.table.deployments[route.main], self.deployments[route.main].backend.service
            longest = service.max_model_len if service is not None else None
            root = spec.engine.model if isinstance(spec, Local) else spec.model
            found.append(
                ModelCard(id=route.name, created=self._front.state.api.created, root=root, max_model_len=longest)
            )
        return found

    # What the operator may ask

    def states(self) -> DeploymentList:
        used = sum(place.gib for place in self._places.values() if place.loaded)
        return DeploymentList(
            data=[self._state(one) for one in self.deployments.values()],
            memory_gib=self.table.memory_gib,
            memory_used_gib=used if self.table.memory_gib is not None else None,
        )

    async def start(self, name: str) -> DeploymentState:
        """Take it into service, and load its model if there is room. Raises HttpError (404)."""
        one = self._known(name)
        one.held = False
        if isinstance(one.backend, LocalBackend):
            self._supervisor.begin(one.backend.place)
        return self._state(one)

    async def stop(self, name: str) -> DeploymentState:
        """Give it no more requests, and take its model out of memory when it has finished those that it has. Raises
        HttpError (404)."""
        one = self._known(name)
        one.held = True
        if isinstance(one.backend, LocalBackend):
            self._supervisor.stop_when_idle(one.backend.place)
        return self._state(one)

    def _known(self, name: str) -> Deployment:
        found = self.deployments.get(name)
        if found is None:
            message = f"There is no deployment of that name. There are {', '.join(self.deployments)}."
            raise HttpError(404, message, code="deployment_not_found", param="name")
        return found

    def _state(self, one: Deployment) -> DeploymentState:
        spec = self.table.deployments[one.name]
        local = isinstance(spec, Local)
        return DeploymentState(
            name=one.name,
            kind="local" if local else "remote",
            model=spec.engine.model if isinstance(spec, Local) else spec.model,
            phase=one.backend.phase,
            routes=[route.name for route in self.table.routes.values() if one.name in route.deployments],
            takes_requests=not one.blocked,
            reason=one.blocked or None,
            circuit=one.breaker.state,
            in_flight=one.load,
            requests=dict(one.counts),
            memory_gib=spec.engine.memory_gib if isinstance(spec, Local) else None,
        )

    def _place(self, name: str, spec: Local, number: int) -> Place:
        old, blocks = spec.server.show_hidden_metrics, spec.engine.kv_cache_metrics
        metrics = Metrics(name, hidden_names=old, blocks=blocks)  # of all its lives
        self.metrics.include(metrics.families)

        async def start() -> Engine:
            model = await LocalModel.begin(spec.engine, spec.server, self._command, metrics, number=number)
            try:
                await model.ready
                await model.warm_up(spec.warm_up)
                return Engine(create_app(model.service, spec.server, metrics, front=self._front), model)
            except BaseException:
                await model.end()
                raise

        return Place(name, start, spec.engine.memory_gib or 0.0)

    async def _open(self) -> None:
        """Load what starts with the server, one after the other: two at once would each be slower on the same cores,
        and would measure the same free memory."""
        for name, spec in self.table.deployments.items():
            if isinstance(spec, Local) and spec.start == "eager":
                try:
                    await self._supervisor.take(self._places[name])
                except RopewayError as error:
                    cause = self._places[name].error or error
                    if not self.gone.done():
                        self.gone.set_result(cause)
                    raise cause from None
                self._supervisor.give_back(self._places[name])
        self.service.opened = True
