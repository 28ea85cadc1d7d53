"""A bare aiohttp server with the relay behind it, and raw clients in front."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from gpulane.errors import ClientError
from gpulane.relay import HeaderRules, Tunnels, relay_http, tunnel
from gpulane.wire import EngineClient, WireError


@dataclass(slots=True, kw_only=True)
class Front:
    """Where the relay listens, and its parts."""

    port: int
    client: EngineClient
    tunnels: Tunnels
    failures: list[Exception]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw connection, with a small receive window of ours."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)

    async def say(self, data: bytes) -> bytes:
        """Send raw bytes and return everything until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(10):
                return await reader.read(-1)
        finally:
            writer.close()


@asynccontextmanager
async def front(
    engine_url: str,
    *,
    prefix: str = "",
    body_bytes_max: int = 1 << 26,
    is_cancelling: bool = False,
    is_decoding: bool = False,
    tunnel_idle_seconds: float = 60.0,
) -> AsyncGenerator[Front]:
    """Serve the relay to one engine on a free port."""
    client = EngineClient(engine_url)
    tunnels = Tunnels()
    failures: list[Exception] = []
    rules = HeaderRules(engine_host=client.origin.authority, prefix=prefix)

    async def relay(request: web.Request) -> web.StreamResponse:
        target = request.raw_path.removeprefix(prefix)
        try:
            if "Upgrade" in request.headers:
                return await tunnel(
                    request,
                    client,
                    target=target,
                    rewrite=rules,
                    tunnels=tunnels,
                    idle_seconds=tunnel_idle_seconds,
                )
            return await relay_http(
                request, client, target=target, rewrite=rules, body_bytes_max=body_bytes_max
            )
        except (WireError, ClientError) as error:
            failures.append(error)
            return web.json_response({"error": {"code": error.code}}, status=error.status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", relay)
    runner = web.AppRunner(
        app,
        access_log=None,
        auto_decompress=is_decoding,
        handler_cancellation=is_cancelling,
        shutdown_timeout=0.2,
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = int(runner.addresses[0][1])
    try:
        yield Front(port=port, client=client, tunnels=tunnels, failures=failures)
    finally:
        tunnels.close_all()
        await runner.cleanup()
        await client.close()
