"""The one event socket to a ComfyUI: always read, opened again when it breaks, never the only source of
truth.

Its client id is new with each connection. Two sockets of one id break each other in the engine (the end of
the first, noticed late, silences the second for good), so the id is kept over a reconnect only while a job
runs that was sent with it.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from typing import Protocol

import aiohttp
import structlog

from gpulane.adapters.comfyui.messages import Message, read_message
from gpulane.engine.comfyui.api import EngineApi
from gpulane.engine.comfyui.timings import Timings

FRAME_BYTES_MAX = 64 * 1024 * 1024
"""Previews and `executed` messages of nodes that put pictures into them."""

_log = structlog.stdlib.get_logger(__name__)

HELLO = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
"""Must be the first text frame. Previews then name their job and node."""


class EventListener(Protocol):
    """What hears the socket. Called at once; must not wait."""

    def on_message(self, message: Message, raw: bytes) -> None: ...

    def on_frame(self, frame: bytes) -> None: ...

    def on_connected(self) -> None: ...


class EventSocket:
    """Keeps one WebSocket open and hands on what comes."""

    def __init__(self, api: EngineApi, timings: Timings, listener: EventListener) -> None:
        self._api = api
        self._timings = timings
        self._listener = listener
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._is_ready = asyncio.Event()
        self._keeps_id: Callable[[], bool] = lambda: False
        self.client_id = _new_id()
        self.breaks = 0
        """How often a connection broke that was not closed by us."""
        self.connects_of_id = 0
        """How many connections the present client id has had."""
        self.queue_remaining: int | None = None
        """What the last status said; None while not connected."""
        self._is_renewing = False
        self._renewal = asyncio.Event()

    def keep_id_while(self, is_needed: Callable[[], bool]) -> None:
        """Keep the client id over reconnects while this says so."""
        self._keeps_id = is_needed

    @property
    def is_connected(self) -> bool:
        return self._is_ready.is_set()

    async def ready(self, seconds: float) -> bool:
        """Wait until connected, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_ready.wait()
        except TimeoutError:
            return False
        return True

    def renew(self) -> None:
        """Close and open again soon. The old one's end is awaited first, or the new one would be mute."""
        if self._socket is not None and not self._is_renewing:
            self._is_renewing = True
            self._is_ready.clear()
            self._renewal.set()

    async def run(self) -> None:
        """Connect, read, and connect again, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._close_on_renewal())
            await self._reconnect()

    async def _close_on_renewal(self) -> None:
        while True:
            await self._renewal.wait()
            self._renewal.clear()
            if self._socket is not None:
                await self._socket.close()

    async def _reconnect(self) -> None:
        rest = self._timings.reconnect_seconds_min
        while True:
            try:
                await self._live()
                rest = self._timings.reconnect_seconds_min
            except (aiohttp.ClientError, OSError, TimeoutError):
                rest = min(rest * 2, self._timings.reconnect_seconds_max)
            except Exception:  # noqa: BLE001 - a fault of a listener must not leave the engine unheard
                _log.exception("events_failed", engine=self._api.name)
                rest = self._timings.reconnect_seconds_max
            if self._is_renewing:
                self._is_renewing = False
                continue
            await asyncio.sleep(rest * random.uniform(0.8, 1.2))

    async def _live(self) -> None:
        """Hold one connection from its opening to its end. Raises when none comes about."""
        if not self._keeps_id():
            self.client_id, self.connects_of_id = _new_id(), 0
        async with asyncio.timeout(self._timings.request_seconds):
            socket = await self._api.session.ws_connect(
                f"{self._api.url}/ws?clientId={self.client_id}",
                heartbeat=self._timings.ping_seconds,
                max_msg_size=FRAME_BYTES_MAX,
            )
        self._socket = socket
        try:
            await socket.send_str(HELLO)
            self.connects_of_id += 1
            self._is_ready.set()
            self._listener.on_connected()
            async for frame in socket:
                self._hand_on(frame)
        finally:
            self._socket = None
            self._is_ready.clear()
            self.queue_remaining = None
            self.breaks += not self._is_renewing
            await socket.close()

    def _hand_on(self, frame: aiohttp.WSMessage) -> None:
        match frame.type:
            case aiohttp.WSMsgType.TEXT:
                message = read_message(frame.data)
                if message is None:
                    return
                if message.queue_remaining is not None:
                    self.queue_remaining = message.queue_remaining
                self._listener.on_message(message, frame.data.encode())
            case aiohttp.WSMsgType.BINARY:
                self._listener.on_frame(frame.data)
            case _:
                pass


def _new_id() -> str:
    return f"gpulane-{uuid.uuid4().hex}"
