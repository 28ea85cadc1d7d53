"""Connections after a 101, read and written by ourselves."""

from __future__ import annotations

import asyncio

import pytest

from gpulane.wire import EngineClient, EngineResponse, MalformedResponse, UpgradedConnection
from tests.integration.raw_engine import Peer, raw_engine

pytestmark = pytest.mark.anyio

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-A: 1\r\n\r\n"
ASKED = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))


async def test_raw_bytes_both_ways_and_half_close() -> None:
    async def script(peer: Peer) -> None:
        head = await peer.head()
        assert "Connection: Upgrade\r\n" in head
        await peer.say(SWITCH + b"first")
        await peer.say((await peer.reader.read(-1))[::-1])

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        upgraded = await client.upgrade("/ws", ASKED)
        assert isinstance(upgraded, UpgradedConnection)
        assert (upgraded.status, upgraded.headers[-1]) == (101, ("X-A", "1"))
        assert await upgraded.read() == b"first"
        await upgraded.write(b"abc")
        upgraded.write_eof()
        assert await upgraded.read() == b"cba"
        assert await upgraded.read() == b""
        await upgraded.close()
        await client.close()


async def test_a_refusal_is_a_response() -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            await peer.answer(b"no", status="400 Bad Request")

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        response = await client.upgrade("/ws", ASKED)
        assert isinstance(response, EngineResponse)
        assert (response.status, await response.read(10)) == (400, b"no")
        await client.close()


async def test_a_switch_that_names_no_protocol_is_refused() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await peer.gone()

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        with pytest.raises(MalformedResponse):
            await client.upgrade("/ws", ASKED)
        await client.close()


async def test_a_slow_engine_makes_the_writer_wait() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(SWITCH)
        await go.wait()
        size = len(await peer.reader.read(-1))
        await peer.say(b"%d" % size)

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url, connections_max=1)
        upgraded = await client.upgrade("/ws", ASKED)
        assert isinstance(upgraded, UpgradedConnection)
        written = [0]

        async def flood() -> None:
            while written[0] < 100 << 20:
                written[0] += 65536
                await upgraded.write(b"a" * 65536)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 0.5)
        assert written[0] < 20 << 20
        go.set()
        upgraded.write_eof()
        assert int(await upgraded.read()) == written[0]
        await upgraded.close()
        await client.close()
