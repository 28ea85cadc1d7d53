"""Starts a front door on a real socket over the stand-in gateway; a fixture per part, ended with the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from gpulane.config import Settings
from gpulane.core.model import EngineState, EngineUrl, GpuId, ModelKey, Service
from gpulane.views import EngineView
from gpulane.web.app import build_app, make_runner
from gpulane.web.http_service import HttpFront
from gpulane.web.ports import Front, Identity
from gpulane.wire import EngineClient
from tests.integration.web.standin import GPU, StandIn

BOUND_SECONDS = 10.0


class Echo:
    """A front that tells what it was given."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.closed = 0

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        return web.json_response(
            {
                "service": self.service.value,
                "target": target,
                "account": identity.account,
                "role": identity.role.value,
            }
        )

    async def close(self) -> None:
        self.closed += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A running front door and a client to it."""

    gateway: StandIn
    client: aiohttp.ClientSession
    url: str
    fronts: dict[Service, Front]

    async def json(self, method: str, path: str, *, status: int = 200, **sent: Any) -> dict[str, Any]:
        """Ask, check the status, return the JSON."""
        async with self.client.request(method, path, **sent) as answer:
            body = await answer.read()
            assert answer.status == status, body
            return msgspec.json.decode(body, type=dict[str, Any])


class Doors:
    """Opens front doors."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.runners: list[web.AppRunner] = []

    async def open(self, settings: Settings | None = None, *, root: Service | str | None = None) -> Door:
        gateway = StandIn(self._folder, settings=settings)
        context = await gateway.open()
        self._stack.push_async_callback(gateway.close)
        fronts: dict[Service, Front] = {
            Service.COMFYUI: Echo(Service.COMFYUI),
            Service.A1111: Echo(Service.A1111),
            Service.HTTP: HttpFront(context),
        }
        url = await self.serve(build_app(context, fronts, root=root))
        client = await self._stack.enter_async_context(
            aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=BOUND_SECONDS))
        )
        return Door(gateway=gateway, client=client, url=url, fronts=fronts)

    async def serve(self, app: web.Application) -> str:
        runner = make_runner(app, shutdown_seconds=1.0)
        self.runners.append(runner)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def engine(
        self,
        door: Door,
        answer: Callable[[web.Request], Any],
        *,
        service: Service = Service.HTTP,
        name: str = "llm",
        gpu: GpuId = GPU,
    ) -> EngineView:
        """Serve a little engine and make it known."""
        app = web.Application()
        app.router.add_route("*", "/{anything:.*}", answer)
        url = EngineUrl(await self.serve(app))
        view = EngineView(
            url=url,
            service=service,
            name=name,
            gpu=gpu,
            state=EngineState.READY,
            why="",
            model=ModelKey(""),
            description=None,
        )
        door.gateway.add_engine(view, client=EngineClient(url))
        return view


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with AsyncExitStack() as stack:
        yield Doors(tmp_path, stack)


@pytest.fixture
async def door(doors: Doors) -> Door:
    return await doors.open()


async def until(condition: Callable[[], bool]) -> None:
    """Poll until it holds, within a bound."""
    async with asyncio.timeout(BOUND_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
