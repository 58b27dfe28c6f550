"""The end of errors in an application that stands behind another one's gate."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.api.middleware import refusal
from ropeway.errors import EngineError, RopewayError

_log = logging.getLogger(__name__)


class Refusals:
    """ASGI middleware: errors become answers, as the gate would answer them. Whoever calls the application then has to
    look at answers alone. Once an answer has begun, errors pass."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except RopewayError as error:
            if begun:
                raise
            await refusal(scope, error)(scope, receive, send)
            error.__traceback__ = None
        except Exception as error:
            if begun:
                raise
            _log.exception("request %s failed", scope["state"]["request_id"])
            await refusal(scope, EngineError(type(error).__name__))(scope, receive, send)
