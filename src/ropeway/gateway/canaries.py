"""The canaries of all routes, as the operator starts and ends them, kept in a file that outlives the server."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec

from ropeway.api.canary_schema import CanaryEvent, CanaryStart, CanaryState
from ropeway.api.errors import HttpError, shown
from ropeway.errors import RequestError, StorageError
from ropeway.experiment import Guard, analyze
from ropeway.gateway.canary import Canary, Event, Record
from ropeway.gateway.outcome import Splitter
from ropeway.store import Database, Schema

_log = logging.getLogger(__name__)

SCHEMA: Final = Schema("canary", ["CREATE TABLE canary (route TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID"])

_SAVE_SECONDS: Final = 5.0
"""How old saved sums may be: what a killed server forgets of a comparison. It never forgets where traffic goes."""


class Canaries:
    """Keeps canaries in the database at `path`, which is made when the first one is started.

    `routes` says which deployments share the load of each public name; `deployments` are those that may be tried.
    Methods belong to the event loop. Raises StorageError where the file cannot be read, and where a decision cannot be
    kept; that to move or end one holds all the same, until the server ends.
    """

    def __init__(
        self,
        path: Path,
        routes: Mapping[str, Collection[str]],
        deployments: Collection[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._routes = routes
        self._deployments = deployments
        self._clock = clock
        self._wall = wall
        self._database: Database | None = None
        self._canaries: dict[str, Canary] = {}
        self._saved: dict[str, float] = {}
        self._saving: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        if path.exists():
            self._load()

    def splitter(self, route: str) -> Splitter | None:
        """Who divides the traffic of `route`; None if it leads where the table of routes says."""
        return self._canaries.get(route)

    def states(self) -> list[CanaryState]:
        return [_state(self._canaries[route]) for route in sorted(self._canaries)]

    async def start(self, route: str, wanted: CanaryStart) -> CanaryState:
        """Raises RequestError or HttpError (404, 409) where that cannot be."""
        if route not in self._routes:
            raise _unknown("route", route, self._routes)
        present = self._canaries.get(route)
        if present is not None and present.record.state == "running":
            message = f"{present.record.canary} is being tried on {route}. Promote it or roll it back first."
            raise HttpError(409, message, code="canary_running")
        control = wanted.control
        if control is None:
            leads = self._routes[route] if present is None else [present.choose("")]
            if len(leads) > 1:
                message = (
                    f"{route} is shared by {', '.join(leads)}. Name one of them: it gets what the canary does not."
                )
                raise RequestError(message, param="control")
            control = next(iter(leads))
        for param, name in (("control", control), ("canary", wanted.canary)):
            if name not in self._deployments:
                raise _unknown(param, name, self._deployments)
        if control == wanted.canary:
            raise RequestError(f"{route} already leads to {control}. Name another deployment to try.", param="canary")
        record = Record(
            route=route,
            control=control,
            canary=wanted.canary,
            weight=wanted.weight,
            salt=secrets.token_hex(8),
            guard=Guard(
                alpha=wanted.alpha,
                max_regression=wanted.max_regression,
                max_error_increase=wanted.max_error_increase,
                min_samples=wanted.min_samples,
            ),
            since=self._wall(),
            events=[Event(self._wall(), f"started, weight {wanted.weight:.3%}")],
        )
        self._canaries[route] = canary = self._made(record)
        try:
            await self._save(route)
        except StorageError:
            # What cannot be kept does not begin.
            self._canaries.pop(route)
            if present is not None:
                self._canaries[route] = present
            raise
        return _state(canary)

    async def set_weight(self, route: str, weight: float) -> CanaryState:
        """Raises HttpError (404, 409)."""
        canary = self._known(route)
        if canary.record.state != "running":
            message = f"The canary of {route} is {canary.record.state}. Start it again to give it a share."
            raise HttpError(409, message, code="canary_ended", param="weight")
        canary.set_weight(weight)
        await self._save(route)
        return _state(canary)

    async def end(self, route: str, *, promoted: bool) -> CanaryState:
        """Raises HttpError (404)."""
        canary = self._known(route)
        canary.end(promoted=promoted)
        await self._save(route)
        return _state(canary)

    async def forget(self, route: str) -> None:
        """Raises HttpError (404, 409)."""
        if self._known(route).record.state == "running":
            message = f"The canary of {route} is running. Promote it or roll it back first."
            raise HttpError(409, message, code="canary_running")
        del self._canaries[route]
        await self._write(route, None)

    async def close(self) -> None:
        """Save all sums, and close the file. Idempotent."""
        await asyncio.gather(*self._saving, *(self._save_quietly(route) for route in self._canaries))
        if self._database is not None:
            self._database.close()
            self._database = None

    def _load(self) -> None:
        self._database = Database(self._path, [SCHEMA])
        rows = self._database.read_now(lambda db: db.execute("SELECT route, record FROM canary").fetchall())
        for row in rows:
            try:
                record = msgspec.json.decode(row["record"], type=Record)
            except msgspec.MsgspecError as error:
                self._database.close()
                message = f"{self._path}: the canary of {row['route']} cannot be read: {error}. "
                raise StorageError(message + "Move the file away to start without canaries.") from None
            missing = [name for name in (record.control, record.canary) if name not in self._deployments]
            if record.route not in self._routes or missing:
                what = f"no deployment {missing[0]}" if missing else "no such route"
                _log.warning("the canary of %s is left out: there is %s", record.route, what)
                continue
            self._canaries[record.route] = self._made(record)
            _log.info("canary of %s is %s, %.3g %%", record.route, record.state, record.weight * 100)

    def _made(self, record: Record) -> Canary:
        def counted() -> None:
            self._on_count(record)

        return Canary(record, clock=self._clock, wall=self._wall, counted=counted)

    def _on_count(self, record: Record) -> None:
        """Save beside the traffic: a stop at once, sums now and then."""
        now = self._clock()
        if record.state == "stopped":
            _log.warning("canary of %s is stopped, all goes to %s: %s", record.route, record.control, record.reason)
        elif now - self._saved.get(record.route, -_SAVE_SECONDS) < _SAVE_SECONDS:
            return
        self._saved[record.route] = now
        task = asyncio.get_running_loop().create_task(self._save_quietly(record.route))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _save_quietly(self, route: str) -> None:
        """The traffic goes on if sums cannot be saved."""
        try:
            await self._save(route)
        except StorageError as error:
            _log.error("the canary of %s is not saved: %s", route, error.message)

    async def _save(self, route: str) -> None:
        canary = self._canaries.get(route)
        if canary is not None:
            await self._write(route, msgspec.json.encode(canary.record))

    async def _write(self, route: str, record: bytes | None) -> None:
        """Put the record of a route, or remove it for None."""

        def work(db: sqlite3.Connection) -> None:
            if record is None:
                db.execute("DELETE FROM canary WHERE route = ?", (route,))
            else:
                db.execute("INSERT OR REPLACE INTO canary VALUES (?, ?)", (route, record))

        async with self._opening:
            if self._database is None:
                self._database = await asyncio.to_thread(Database, self._path, [SCHEMA])
        await self._database.write(work)

    def _known(self, route: str) -> Canary:
        canary = self._canaries.get(route)
        if canary is None:
            name = shown(route, "of that name")
            raise HttpError(404, f"The route {name} has no canary. Start one.", code="no_canary", param="route")
        return canary


def _state(canary: Canary) -> CanaryState:
    record = canary.record
    return CanaryState(
        route=record.route,
        control=record.control,
        canary=record.canary,
        state=record.state,
        weight=record.weight,
        trial=record.trial,
        since=record.since,
        reason=record.reason,
        max_regression=record.guard.max_regression,
        max_error_increase=record.guard.max_error_increase,
        analysis=analyze(canary.trial, record.guard, canary.alpha),
        events=[CanaryEvent(event.at, event.what) for event in record.events],
    )


def _unknown(param: str, name: str, known: Collection[str]) -> HttpError:
    shown = f" {name}" if len(name) <= 128 and name.isprintable() else ""
    listed = ", ".join(sorted(known)[:20]) or "none"
    kind = "route" if param == "route" else "deployment"
    status = 404 if param == "route" else 400
    return HttpError(status, f"There is no {kind}{shown}. There are: {listed}.", code=f"{kind}_not_found", param=param)
