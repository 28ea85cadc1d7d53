"""What is found at an address, and the reason in words when it is no engine."""

import asyncio
import socket

import pytest
from aiohttp import web

from gpulane.core.model import EngineUrl, Service
from gpulane.engine.detect import detect
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.comfyui import SimComfyUI
from gpulane.testing.http_engine import SimHttpEngine
from tests.integration.raw_engine import Peer, raw_engine

pytestmark = pytest.mark.anyio


async def test_comfyui() -> None:
    async with SimComfyUI() as engine:
        found = await detect(EngineUrl(engine.url))
    assert (found.service, found.flavor, found.answers) == (Service.COMFYUI, "comfyui", True)


@pytest.mark.parametrize(("forge", "nowebui"), [(False, False), (True, False), (False, True)])
async def test_a1111_and_its_relatives(forge: bool, nowebui: bool) -> None:
    async with SimA1111(forge=forge, nowebui=nowebui) as engine:
        found = await detect(EngineUrl(engine.url))
    assert (found.service, found.flavor) == (Service.A1111, "forge" if forge else "a1111")


async def test_a_server_that_is_no_engine() -> None:
    async with SimHttpEngine() as engine:
        found = await detect(EngineUrl(engine.url))
    assert found.service is None and found.answers and "none of their API paths" in found.why


async def test_a_page_that_answers_everything() -> None:
    async def agree(peer: Peer) -> None:
        while await peer.head():
            await peer.answer(b"<html>hello</html>")

    async with raw_engine(agree) as engine:
        found = await detect(EngineUrl(engine.url))
    assert found.service is None and found.answers


async def test_a_login_is_asked_for() -> None:
    async def refuse(peer: Peer) -> None:
        while await peer.head():
            await peer.answer(b'{"detail":"Not authenticated"}', status="401 Unauthorized")

    async with raw_engine(refuse) as engine:
        found = await detect(EngineUrl(engine.url))
    assert found.service is None and "login" in found.why


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = await detect(EngineUrl(f"http://127.0.0.1:{taken.getsockname()[1]}"))
    assert found.service is None and not found.answers and "refused" in found.why


async def test_a_silent_server() -> None:
    async def mute(peer: Peer) -> None:
        await peer.gone()

    async with raw_engine(mute) as engine, asyncio.timeout(5):
        found = await detect(EngineUrl(engine.url), seconds_max=0.3)
    assert found.service is None and not found.answers and "no answer within 0.3 s" in found.why


async def test_something_that_speaks_no_http() -> None:
    async def mutter(peer: Peer) -> None:
        await peer.say(b"SSH-2.0-OpenSSH_9.2\r\n")

    async with raw_engine(mutter) as engine:
        found = await detect(EngineUrl(engine.url))
    assert found.service is None and found.answers and "no HTTP" in found.why


async def test_an_address_that_is_none() -> None:
    assert "not an engine's address" in (await detect(EngineUrl("ftp://x"))).why


async def test_a_gateway_is_no_engine() -> None:
    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def stats(_: web.Request) -> web.Response:
        return web.json_response({"system": {}})

    app = web.Application()
    app.router.add_get("/gpulane/healthz", healthz)
    app.router.add_get("/system_stats", stats)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    found = await detect(EngineUrl(f"http://127.0.0.1:{port}"))
    await runner.cleanup()
    assert found.service is None
    assert "gpulane itself" in found.why
