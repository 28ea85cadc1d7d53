"""A held answer between a raw engine and raw clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from gpulane.relay import HeaderRules, HeldAnswer, hold, send_held
from gpulane.wire import EngineClient, EngineDisconnected
from tests.integration.raw_engine import Peer, raw_engine

pytestmark = pytest.mark.anyio

ASK = b"GET / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n"
RULES = HeaderRules(engine_host="engine:1")


@asynccontextmanager
async def serving(answer: HeldAnswer) -> AsyncGenerator[int]:
    """Send the answer to whoever asks; yields the port."""

    async def give(request: web.Request) -> web.StreamResponse:
        return await send_held(request, answer, rewrite=RULES, added=(("X-Gpulane-Job", "1"),))

    app = web.Application()
    app.router.add_get("/", give)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def test_a_client_that_does_not_read_does_not_hold_the_engine(tmp_path: Path) -> None:
    size = 30 << 20

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.answer(b"a" * size, head="X-A: 1\r\n", status="200 Fine")

    answer = HeldAnswer(tmp_path, bytes_max=1 << 30, memory_bytes_max=1 << 20)
    async with raw_engine(script) as engine, serving(answer) as port:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in slow:
            writer.write(ASK)
        client = EngineClient(engine.url)
        await asyncio.wait_for(hold(await client.request("GET", "/"), answer), 10)  # nobody has read yet
        assert answer.is_finished and answer.is_spooled
        late = await asyncio.open_connection("127.0.0.1", port)
        late[1].write(ASK)
        slow[0][1].close()  # a client that leaves takes nothing from the others
        head = await late[0].readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 Fine\r\nX-A: 1\r\nX-Gpulane-Job: 1\r\n")
        assert b"Content-Length: %d\r\n" % size in head
        assert len(await late[0].read(-1)) == size
        assert b"chunked" in await slow[1][0].readuntil(b"\r\n\r\n")
        assert (await slow[1][0].read(-1)).count(b"a") > size - 1
        for _, writer in (late, *slow):
            writer.close()
        await client.close()
    answer.close()
    assert not list(tmp_path.iterdir())


async def test_an_engine_that_dies_shows_at_the_client(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")

    answer = HeldAnswer(tmp_path, bytes_max=1 << 20)
    async with raw_engine(script) as engine, serving(answer) as port:
        client = EngineClient(engine.url)
        with pytest.raises(EngineDisconnected):
            await hold(await client.request("GET", "/"), answer)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        got = await asyncio.wait_for(reader.read(-1), 5)
        assert b"3\r\nabc\r\n" in got and not got.endswith(b"0\r\n\r\n")
        writer.close()
        await client.close()


async def test_holding_that_is_cancelled_closes_the_engine_and_tells_the_readers(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
        await peer.gone()
        gone.set()

    answer = HeldAnswer(tmp_path, bytes_max=1 << 20)
    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hold(await client.request("GET", "/"), answer), 0.1)
        await asyncio.wait_for(gone.wait(), 5)
        assert answer.is_ended and not answer.is_finished
        await client.close()
