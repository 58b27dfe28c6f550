"""Waiting for what is to happen, and no longer."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], good: Callable[[T], object] = bool, seconds: float = 60.0, pause: float = 0.01) -> T:
    """The first answer of `look` that is `good`; it is asked every `pause` seconds. AssertionError after `seconds`."""
    limit = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < limit, f"it does not happen within {seconds} s: {found!r}"
        time.sleep(pause)
    return found


async def eventually(
    look: Callable[[], T | Awaitable[T]], good: Callable[[T], object] = bool, seconds: float = 60.0, pause: float = 0.01
) -> T:
    """The same on an event loop, which goes on meanwhile. What `look` returns may have to be awaited."""
    limit = time.monotonic() + seconds
    while True:
        found = look()
        if inspect.isawaitable(found):
            found = await found
        if good(found):
            return found
        assert time.monotonic() < limit, f"it does not happen within {seconds} s: {found!r}"
        await asyncio.sleep(pause)
