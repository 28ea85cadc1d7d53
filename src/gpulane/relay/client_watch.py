"""Notices that the client has left while we wait for its engine.

aiohttp's server tells a request's code of that only when it is run with `handler_cancellation=True`; this
works either way, a little later.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from aiohttp import web

WATCH_SECONDS = 0.5
"""How often a waiting request looks whether its client is still there."""


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


class ClientWatch:
    """Raises ClientGone out of its block soon after the client's connection is lost.

    It cancels the task and takes that back at the block's end, as asyncio.timeout does; that class
    and a generator around it cost a tenth of a relayed request.
    """

    __slots__ = ("_cancelling", "_has_cancelled", "_loop", "_request", "_task", "_timer")

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._has_cancelled = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = self._loop.call_later(WATCH_SECONDS, self._look)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._has_cancelled:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ClientGone from None

    def _look(self) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            self._has_cancelled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(WATCH_SECONDS, self._look)
