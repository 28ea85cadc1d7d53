"""Notices that the client has left while we wait for its engine.

aiohttp's server tells a request's code of that only when it is run with `handler_cancellation=True`; this
works either way, a little later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

WATCH_SECONDS = 0.5
"""How often a waiting request looks whether its client is still there."""


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


@asynccontextmanager
async def client_watched(request: web.Request) -> AsyncGenerator[None]:
    """Raise ClientGone out of the block soon after the client's connection is lost."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        nonlocal timer
        transport = request.transport
        if transport is None or transport.is_closing():
            scope.reschedule(loop.time())
        else:
            timer = loop.call_later(WATCH_SECONDS, look)

    scope = asyncio.timeout(None)
    timer = loop.call_later(WATCH_SECONDS, look)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise ClientGone from None
        raise
    finally:
        timer.cancel()
