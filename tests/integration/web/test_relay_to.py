"""What is no job, relayed through the front door: WebSockets, clients that leave, a server that stops."""

from __future__ import annotations

import asyncio
import hashlib

import aiohttp
import pytest
from aiohttp import web

from gpulane.config import KeySettings, Settings
from tests.integration.web.conftest import BOUND_SECONDS, Door, Doors, until

pytestmark = pytest.mark.anyio


class Engine:
    """Echoes over a WebSocket, and answers slowly over HTTP."""

    def __init__(self) -> None:
        self.sockets = 0
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/ws":
                return await self._echo(request)
            case "/slow":
                return await self._wait(request)
            case _:
                return web.json_response({"path": request.path, "body": (await request.read()).decode()})

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets += 1
        try:
            async for message in socket:
                await socket.send_str(f"echo {message.data}")
        finally:
            self.sockets -= 1
        return socket

    async def _wait(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        return response


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def llm(doors: Doors, door: Door, engine: Engine) -> Door:
    await doors.engine(door, engine.answer)
    return door


async def test_websocket_passes_both_ways(llm: Door, engine: Engine) -> None:
    async with llm.client.ws_connect("/svc/llm/ws") as socket:
        await socket.send_str("hello")
        assert await socket.receive_str() == "echo hello"
        assert engine.sockets == 1
    await until(lambda: engine.sockets == 0)


async def test_websocket_of_another_site_is_refused(llm: Door, engine: Engine) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await llm.client.ws_connect("/svc/llm/ws", headers={"Origin": "http://evil.example"})
    assert refused.value.status == 403
    assert engine.sockets == 0


async def test_client_that_leaves_frees_the_engine(llm: Door, engine: Engine) -> None:
    response = await llm.client.get("/svc/llm/slow")
    assert await response.content.readany() == b"begun"
    response.close()
    async with asyncio.timeout(BOUND_SECONDS):
        await engine.left.wait()


async def test_server_stops_with_open_tunnels(doors: Doors, engine: Engine) -> None:
    door = await doors.open()
    runner = doors.runners[-1]
    await doors.engine(door, engine.answer)
    async with door.client.ws_connect("/svc/llm/ws") as socket:
        await socket.send_str("hello")
        assert await socket.receive_str() == "echo hello"
        async with asyncio.timeout(5.0):
            await runner.cleanup()
        message = await socket.receive()
        assert message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING}
    await until(lambda: engine.sockets == 0)


async def test_viewers_only_look(doors: Doors, engine: Engine) -> None:
    key = KeySettings(account="eye", sha256=hashlib.sha256(b"k").hexdigest(), role="viewer")
    door = await doors.open(Settings(keys=(key,)))
    await doors.engine(door, engine.answer)
    headers = {"X-Api-Key": "k"}
    assert (await door.json("GET", "/svc/llm/x", headers=headers))["path"] == "/x"
    await door.json("POST", "/svc/llm/x", status=403, headers=headers)
    await door.json("POST", "/svc/llm/v1/chat/completions", status=403, headers=headers, json={})


async def test_only_http_service_is_the_root(llm: Door) -> None:
    told = await llm.json("POST", "/anything/at%20all", data=b"abc")
    assert told == {"path": "/anything/at all", "body": "abc"}


async def test_own_listener_of_a_named_service(doors: Doors, engine: Engine) -> None:
    door = await doors.open(root="llm")
    await doors.engine(door, engine.answer)
    await doors.engine(door, engine.answer, name="other")
    assert (await door.json("GET", "/gpulane/v1/jobs"))["path"] == "/gpulane/v1/jobs"
