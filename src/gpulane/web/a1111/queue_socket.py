"""Gradio 3's /queue/join: one WebSocket per call. The first message says which function; only then is it
known where it goes.

A call that passes is replayed to its engine, and frames are copied from there on; every frame of the client
that names a function must name the same one, since it is the last frame's that the engine runs.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from gpulane.adapters.a1111.gradio import function_of
from gpulane.errors import GpulaneError, Unavailable
from gpulane.web.a1111.engine_calls import EngineCalls
from gpulane.web.a1111.functions import FunctionLists, Functions
from gpulane.web.ports import EngineView

HASH_SECONDS: Final = 5.0
DATA_SECONDS: Final = 60.0
"""Gradio's own limits for the two messages of a client."""
CONNECT_SECONDS: Final = 15.0
CLOSE_SECONDS: Final = 5.0
OPEN_MAX: Final = 4096
"""Sockets open at one time; a page opens eight while it loads."""
_ABNORMAL: Final = frozenset({1005, 1006, 1015})
"""Codes that stand for no code; they must not be sent."""


class _Hash(msgspec.Struct, kw_only=True):
    fn_index: int
    session_hash: str


class _Data(msgspec.Struct, kw_only=True):
    data: list[msgspec.Raw] = []


@dataclass(slots=True, kw_only=True)
class Served:
    """A socket that was served."""

    response: web.WebSocketResponse
    refused_task: str | None = None
    """The page's id of a call that was refused, for its progress bar."""


class QueueSockets:
    """Serves them."""

    def __init__(self, functions: FunctionLists, calls: EngineCalls, *, frame_bytes_max: int) -> None:
        self._functions = functions
        self._calls = calls
        self._frame_bytes_max = frame_bytes_max
        self._session: aiohttp.ClientSession | None = None
        self._open: set[web.WebSocketResponse] = set()

    async def serve(self, request: web.Request, target: str, engine: EngineView, refusal: str) -> Served:
        """Serve one call to its end."""
        if len(self._open) >= OPEN_MAX:
            raise Unavailable("Too many open WebSocket connections.", retry_after_seconds=5.0)
        socket = web.WebSocketResponse(
            max_msg_size=self._frame_bytes_max, compress=False, timeout=CLOSE_SECONDS
        )
        await socket.prepare(request)
        self._open.add(socket)
        served = Served(response=socket)
        try:
            served.refused_task = await self._converse(request, target, engine, socket, refusal)
        except (ConnectionError, aiohttp.ClientError, GpulaneError, TimeoutError):
            await socket.close(code=WSCloseCode.INTERNAL_ERROR)
        finally:
            self._open.discard(socket)
        return served

    async def close(self) -> None:
        """Say goodbye to the pages: the gateway stops."""
        for socket in tuple(self._open):
            await socket.close(code=WSCloseCode.GOING_AWAY)
        if self._session is not None:
            await self._session.close()

    async def _converse(
        self,
        request: web.Request,
        target: str,
        engine: EngineView,
        socket: web.WebSocketResponse,
        refusal: str,
    ) -> str | None:
        """Learn the function and pass the call on, or refuse it; returns the id of a refused task."""
        await socket.send_str('{"msg":"send_hash"}')
        called = _hash(await _receive_text(socket, HASH_SECONDS))
        if called is None:
            await socket.close(code=WSCloseCode.POLICY_VIOLATION)
            return None
        functions = await self._functions.of(request, engine)
        if called.fn_index in functions.passing:
            await self._pass_on(request, target, engine, socket, called)
            return None
        return await _refuse(socket, called, functions, refusal)

    # --- what passes

    async def _pass_on(
        self,
        request: web.Request,
        target: str,
        engine: EngineView,
        socket: web.WebSocketResponse,
        called: _Hash,
    ) -> None:
        skipped = {"host", "upgrade", "connection"}
        headers = [
            (name, value)
            for name, value in self._calls.headers(request, engine)
            if name.lower() not in skipped and not name.lower().startswith("sec-websocket-")
        ]
        async with asyncio.timeout(CONNECT_SECONDS):
            upstream = await self._client().ws_connect(
                f"{engine.url}{target}", headers=headers, max_msg_size=self._frame_bytes_max, compress=0
            )
        async with upstream:
            # The engine's own send_hash is answered with what the client told us.
            asked = await upstream.receive(CONNECT_SECONDS)
            if asked.type is WSMsgType.TEXT:
                await upstream.send_str(msgspec.json.encode(called).decode())
                await _copy(socket, upstream, called)
        await _close_alike(socket, upstream)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Cookies are the client's own affair, and no total time: an event may wait for long.
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None)
            )
        return self._session


Upstream = aiohttp.ClientWebSocketResponse


async def _copy(socket: web.WebSocketResponse, upstream: Upstream, called: _Hash) -> None:
    """Copy frames both ways until one side closes."""
    async with asyncio.TaskGroup() as tasks:
        there = tasks.create_task(_copy_there(socket, upstream, called))
        back = tasks.create_task(_copy_back(socket, upstream))
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        there.cancel()
        back.cancel()


async def _close_alike(socket: web.WebSocketResponse, upstream: Upstream) -> None:
    code = upstream.close_code or WSCloseCode.OK
    await socket.close(code=WSCloseCode.INTERNAL_ERROR if code in _ABNORMAL else code)


async def _copy_there(socket: web.WebSocketResponse, upstream: Upstream, called: _Hash) -> None:
    with suppress(ConnectionError, aiohttp.ClientError):
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            text = str(message.data)
            if function_of(text.encode()) != called.fn_index:
                break
            await upstream.send_str(text)


async def _copy_back(socket: web.WebSocketResponse, upstream: Upstream) -> None:
    with suppress(ConnectionError, aiohttp.ClientError):
        async for message in upstream:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(str(message.data))


# --- what does not


async def _refuse(
    socket: web.WebSocketResponse, called: _Hash, functions: Functions, refusal: str
) -> str | None:
    """Play Gradio's queue to the end of the call, with an error; a silent function just ends."""
    is_silent = called.fn_index in functions.silent
    await _send(socket, {"msg": "estimation", "rank": 0, "queue_size": 1, "rank_eta": 0.0, "queue_eta": 0.0})
    await _send(socket, {"msg": "send_data"})
    task = _task_of(await _receive_text(socket, DATA_SECONDS))
    await _send(socket, {"msg": "process_starts"})
    output: dict[str, object] = {"error": refusal}
    if is_silent:
        output = {"data": [], "is_generating": False, "duration": 0.0, "average_duration": 0.0}
    await _send(socket, {"msg": "process_completed", "output": output, "success": is_silent})
    await socket.close()
    return None if is_silent else task


async def _send(socket: web.WebSocketResponse, message: dict[str, object]) -> None:
    await socket.send_str(msgspec.json.encode(message).decode())


async def _receive_text(socket: web.WebSocketResponse, seconds: float) -> str:
    """Return the client's next message. Raises TimeoutError, ConnectionError when there is none."""
    async with asyncio.timeout(seconds):
        message = await socket.receive()
    if message.type is not WSMsgType.TEXT:
        raise ConnectionError("the page has closed its socket")
    return str(message.data)


def _hash(text: str) -> _Hash | None:
    try:
        return msgspec.json.decode(text, type=_Hash)
    except (msgspec.DecodeError, RecursionError):
        return None


def _task_of(text: str) -> str | None:
    """Return the page's id of a call, its first argument (`task(...)`)."""
    try:
        data = msgspec.json.decode(text, type=_Data).data
        return msgspec.json.decode(data[0], type=str) if data else None
    except (msgspec.DecodeError, RecursionError):
        return None
