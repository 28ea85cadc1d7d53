"""An upstream made of a bare socket server: each test writes the bytes it wants the engine to say.

It shares no code with `gpulane.wire`, so that a misreading of HTTP there cannot be agreed with here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Script = Callable[["Peer"], Awaitable[None]]
WAIT_SECONDS = 10.0


class Peer:
    """One accepted connection, as the engine's side sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: int) -> None:
        self.reader = reader
        self.writer = writer
        self.index = index
        """0 for the first connection ever accepted."""

    async def head(self) -> str:
        """Read a request head; "" when the client has closed."""
        try:
            return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""

    async def body(self, head: str) -> bytes:
        """Read the body that a head announces."""
        lines = [line.lower() for line in head.split("\r\n")]
        for line in lines:
            if line.startswith("content-length:"):
                return await self.reader.readexactly(int(line.split(":")[1]))
        if "transfer-encoding: chunked" not in lines:
            return b""
        parts: list[bytes] = []
        while size := int(await self.reader.readline(), 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(parts)

    async def say(self, data: bytes) -> None:
        """Write and wait for room."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, *, head: str = "", status: str = "200 OK") -> None:
        """Say an ordinary answer with a length."""
        text = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n"
        await self.say(text.encode("latin-1") + body)

    async def gone(self) -> bytes:
        """Wait until the client closes; return what it still said."""
        async with asyncio.timeout(WAIT_SECONDS):
            with suppress(ConnectionError):
                return await self.reader.read(-1)
        return b""

    def reset(self) -> None:
        """Close without ceremony."""
        self.writer.transport.abort()


class RawEngine:
    """A listening script."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.failures: list[BaseException] = []
        self.port = 0

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Run the script over one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(reader, writer, self.connections)
        self.connections += 1
        try:
            await self._script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Only `stop` cancels; asyncio's streams would log it as an error.
            pass
        except Exception as error:  # noqa: BLE001 - shown by the fixture's exit
            self.failures.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        """End the scripts that still wait."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failures:
            raise self.failures[0]


@asynccontextmanager
async def raw_engine(script: Script) -> AsyncGenerator[RawEngine]:
    """Serve `script` on a free port of the loopback."""
    engine = RawEngine(script)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=1 << 20)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        await engine.stop()
        await server.wait_closed()


async def until(claim: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Poll a claim until it holds."""
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.005)
