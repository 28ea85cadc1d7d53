"""The tunnel, with WebSocket programs that others wrote and with raw sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from tests.integration.raw_engine import Peer, raw_engine, until
from tests.integration.relay.front import front

pytestmark = pytest.mark.anyio

UPGRADE = (
    b"GET /ws?clientId=a%20b HTTP/1.1\r\nHost: us\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n"
    b"Origin: http://evil\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-A: 1\r\n\r\n"


@asynccontextmanager
async def echo_engine() -> AsyncGenerator[str]:
    """A real WebSocket server: aiohttp's."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                await socket.send_bytes(message.data)
            elif message.data == "bye":
                await socket.close(code=4001, message=b"as you wish")
            else:
                await socket.send_str(message.data)
        return socket

    app = web.Application()
    app.router.add_get("/ws", echo)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_real_client_talks_to_a_real_server() -> None:
    async with (
        echo_engine() as url,
        front(url) as server,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws", max_msg_size=0, headers={"Origin": "http://evil"}) as socket,
    ):
        for size in (0, 1, 125, 126, 65536, 100_000, 8 << 20):
            data = bytes(size)
            await socket.send_bytes(data)
            assert await socket.receive_bytes(timeout=10) == data
        await socket.send_str("bye")
        message = await socket.receive(timeout=10)
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4001)
        await until(lambda: len(server.tunnels) == 0)


async def test_many_sockets_come_and_go() -> None:
    async with echo_engine() as url, front(url) as server, aiohttp.ClientSession() as session:

        async def one(index: int) -> None:
            async with session.ws_connect(f"{server.url}/ws") as socket:
                await socket.send_str(str(index))
                assert await socket.receive_str(timeout=10) == str(index)

        async with asyncio.TaskGroup() as group:
            for index in range(50):
                group.create_task(one(index))
        await until(lambda: len(server.tunnels) == 0)


async def test_an_answer_other_than_101_comes_back_as_it_is() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.answer(b"no", status="403 Forbidden")

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert await reader.readexactly(2) == b"no"
        writer.close()


async def test_bytes_right_behind_both_heads_are_passed_on() -> None:
    heads: list[str] = []

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        await peer.say(SWITCH + b"engine first")
        assert await peer.reader.readexactly(12) == b"client first"
        await peer.say(b"!")

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE + b"client first")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head == (
            b"HTTP/1.1 101 Switching Protocols\r\nX-A: 1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert await asyncio.wait_for(reader.read(-1), 5) == b"engine first!"
        writer.close()
    assert heads[0].startswith("GET /ws?clientId=a%20b HTTP/1.1\r\n")
    assert "evil" not in heads[0]
    assert "Upgrade: websocket\r\nConnection: Upgrade\r\n" in heads[0]


async def test_each_direction_can_end_on_its_own() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(SWITCH)
        heard = await peer.reader.read(-1)  # until the client's end
        await peer.say(heard[::-1])

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"abc")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), 5) == b"cba"
        writer.close()
        await until(lambda: len(server.tunnels) == 0)


@pytest.mark.parametrize("is_engine_slow", [False, True])
async def test_a_slow_side_makes_the_other_wait(is_engine_slow: bool) -> None:
    progress = [0]
    total = 40 << 20
    go = asyncio.Event()
    sizes: list[int] = []

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(total // 65536):
            writer.write(b"a" * 65536)
            await writer.drain()
            progress[0] += 65536
        writer.write_eof()

    async def receive(reader: asyncio.StreamReader) -> None:
        await go.wait()
        size = 0
        while data := await reader.read(1 << 20):
            size += len(data)
        sizes.append(size)

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(SWITCH)
        await (receive(peer.reader) if is_engine_slow else send(peer.writer))

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(send(writer) if is_engine_slow else receive(reader))
            previous = -1
            while progress[0] != previous:
                previous = progress[0]
                await asyncio.sleep(0.1)
            assert progress[0] < 30 << 20
            go.set()
        await until(lambda: sizes == [total])
        writer.close()


@pytest.mark.parametrize("is_cancelling", [False, True])
async def test_whoever_leaves_the_other_is_told(is_cancelling: bool) -> None:
    gone = [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(SWITCH)
        if peer.index == 0:
            await peer.gone()
            gone[0] += 1
        else:
            peer.reset()

    async with raw_engine(script) as engine, front(engine.url, is_cancelling=is_cancelling) as server:
        for count in (1, 2):
            reader, writer = await server.connect()
            writer.write(UPGRADE)
            await reader.readuntil(b"\r\n\r\n")
            if count == 1:
                writer.transport.abort()
                await until(lambda: gone[0] == 1)
            else:
                assert await asyncio.wait_for(reader.read(-1), 5) == b""
            writer.close()
            await until(lambda: len(server.tunnels) == 0)


async def test_idle_tunnels_and_drained_ones_are_closed() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(SWITCH)
        await peer.gone()

    async with raw_engine(script) as engine, front(engine.url, tunnel_idle_seconds=0.1) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.read(-1), 5) == b""
        writer.close()
    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: len(server.tunnels) == 1)
        server.tunnels.close_all()
        assert await asyncio.wait_for(reader.read(-1), 5) == b""
        writer.close()
