"""What all simulated engines have in common: a listener that can die and come back, and the `/sim` paths.

An engine's life is what a process would be: `start` begins one, `crash` ends it with every connection cut and
every task of it cancelled, `restart` does both. The port stays the same.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Final, Protocol

from aiohttp import web

from gpulane.testing.card import Json
from gpulane.testing.faults import Faults

EXIT_STATUS_OF_A_CRASH: Final = 137
"""As after kill -9."""

SLOW_CHUNKS_PER_SECOND: Final = 10

Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Engine(Protocol):
    """What the server asks of an engine."""

    def add_routes(self, app: web.Application) -> None:
        """Put the engine's paths into the app."""
        ...

    def begin_life(self, url: str) -> None:
        """The process starts: empty queue, nothing loaded. Tasks are started with `server.spawn`."""
        ...

    def end_life(self, *, in_order: bool) -> None:
        """The process ends, by SIGTERM or by a crash."""
        ...

    async def drop_sockets(self) -> None:
        """Close all WebSockets."""
        ...

    def sim_state(self) -> dict[str, Json]:
        """The engine's part of `GET /sim/state`."""
        ...


class SimServer:
    """Serves one engine on one port."""

    def __init__(
        self,
        engine: Engine,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        faults: Faults | None = None,
        max_body_bytes: int = 100 * 1024**2,
        exits_on_crash: bool = False,
    ) -> None:
        self.faults = faults or Faults()
        self.host = host
        self.port = port
        self.is_up = False
        self.requests = 0
        self.lives = 0
        self._engine = engine
        self._max_body_bytes = max_body_bytes
        self._exits_on_crash = exits_on_crash
        self._stack = AsyncExitStack()
        self._group: asyncio.TaskGroup | None = None
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._tasks_of_this_life: set[asyncio.Task[Json]] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Listen and begin a life."""
        app = web.Application(middlewares=[self._misbehave], client_max_size=self._max_body_bytes)
        app.router.add_post("/sim/faults", self._post_faults)
        app.router.add_get("/sim/faults", self._get_faults)
        app.router.add_get("/sim/state", self._get_state)
        self._engine.add_routes(app)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        self._group = await self._stack.enter_async_context(asyncio.TaskGroup())
        await self._listen()
        self._begin_life()

    async def stop(self) -> None:
        """End in order."""
        if self.is_up:
            self._end_life(in_order=True)
        await self._engine.drop_sockets()
        await self._close_listener()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._stack.aclose()

    def spawn(self, work: Coroutine[Json, Json, Json], *, name: str) -> "asyncio.Task[Json]":
        """Start a task that ends with this life."""
        assert self._group is not None, "the server is not started"
        task: asyncio.Task[Json] = self._group.create_task(work, name=name)
        self._tasks_of_this_life.add(task)
        task.add_done_callback(self._tasks_of_this_life.discard)
        return task

    async def crash(self) -> None:
        """Die: connections are cut, tasks cancelled, nothing is said to anybody."""
        if not self.is_up:
            return
        self._end_life(in_order=False)
        if self._exits_on_crash:
            os._exit(EXIT_STATUS_OF_A_CRASH)
        await self._close_listener()
        self._cut_connections()

    def crash_soon(self) -> None:
        """Die, asked for by a task of the life that ends with it."""
        assert self._group is not None
        self._group.create_task(self.crash(), name="crash")

    async def restart(self) -> None:
        """Die and come back on the same port, having forgotten everything."""
        await self.crash()
        await self._close_listener()
        await self._listen()
        self._begin_life()

    async def refuse(self, seconds: float) -> None:
        """Cut all connections and refuse new ones for a while; what runs goes on."""
        await self._close_listener()
        self._cut_connections()
        self.spawn(self._listen_again_after(seconds), name="listen again")

    # -- the pieces of that

    def _begin_life(self) -> None:
        self.is_up = True
        self.lives += 1
        self._engine.begin_life(self.url)

    def _end_life(self, *, in_order: bool) -> None:
        self.is_up = False
        self._engine.end_life(in_order=in_order)
        current = asyncio.current_task()
        for task in list(self._tasks_of_this_life):
            if task is not current:
                task.cancel()

    async def _listen(self) -> None:
        assert self._runner is not None
        self._site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True)
        await self._site.start()
        self.port = int(self._runner.addresses[0][1])

    async def _close_listener(self) -> None:
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()

    def _cut_connections(self) -> None:
        assert self._runner is not None
        if self._runner.server is None:
            return
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _listen_again_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._listen()

    # -- HTTP

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Answerer) -> web.StreamResponse:
        if request.path.startswith("/sim/"):
            return await handler(request)
        self.requests += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks_of_this_life.add(task)
        try:
            if self.faults.latency_seconds:
                await asyncio.sleep(self.faults.latency_seconds)
            if self.faults.strike("fail_requests"):
                return web.Response(
                    status=500, text="500 Internal Server Error\n\nServer got itself in trouble"
                )
            return await self._spoiled(request, await handler(request))
        finally:
            self._tasks_of_this_life.discard(task)

    async def _spoiled(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        """The answer, slowly or only half of it when a fault says so."""
        rate = self.faults.slow_body_bytes_per_second
        if (
            not isinstance(response, web.Response)
            or not isinstance(response.body, bytes)
            or not response.body
        ):
            return response
        is_cut = self.faults.strike("truncate_responses")
        if not is_cut and not rate:
            return response
        body = response.body
        slow = web.StreamResponse(status=response.status, headers=response.headers)
        slow.content_length = len(body)
        await slow.prepare(request)
        wanted = body[: len(body) // 2] if is_cut else body
        chunk_bytes = max(1, rate // SLOW_CHUNKS_PER_SECOND) if rate else len(body)
        for start in range(0, len(wanted), chunk_bytes):
            await slow.write(wanted[start : start + chunk_bytes])
            if rate:
                await asyncio.sleep(1 / SLOW_CHUNKS_PER_SECOND)
        if is_cut:
            if request.transport is not None:
                request.transport.close()
        else:
            await slow.write_eof()
        return slow

    async def _get_faults(self, _request: web.Request) -> web.Response:
        return web.json_response(self.faults.as_dict())

    async def _get_state(self, _request: web.Request) -> web.Response:
        state = {"up": self.is_up, "lives": self.lives, "requests": self.requests}
        return web.json_response(state | self._engine.sim_state() | {"faults": self.faults.as_dict()})

    async def _post_faults(self, request: web.Request) -> web.StreamResponse:
        try:
            changes: Json = await request.json()
            self.faults.set(changes)
        except (ValueError, TypeError, AttributeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        response = web.json_response(self.faults.as_dict())
        # The answer goes out first: some of the actions cut this very connection.
        await response.prepare(request)
        await response.write_eof()
        await self._act(changes)
        return response

    async def _act(self, changes: dict[str, Json]) -> None:
        if changes.get("drop_ws"):
            await self._engine.drop_sockets()
        if changes.get("refuse_seconds"):
            await self.refuse(float(changes["refuse_seconds"]))
        if changes.get("crash"):
            await self.crash()
        if changes.get("restart"):
            await self.restart()
