"""A pool of connections to one engine, and the rules by which a request may be tried again.

A request is repeated only when the engine cannot have acted on it: GET and HEAD once when a kept connection
turns out dead before a byte of the answer; anything else only when not a byte was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Sequence

from gpulane.wire.connection import EngineConnection
from gpulane.wire.errors import ConnectFailed, ConnectRefused, ConnectTimeout, EngineDisconnected, is_refusal
from gpulane.wire.exchange import Exchange, Timeouts
from gpulane.wire.head import Framing, Origin, parse_origin, request_head
from gpulane.wire.response import EngineResponse
from gpulane.wire.upgrade import UpgradedConnection

IDLE_SECONDS_MAX = 4.0
"""A kept connection is not used after this: uvicorn, which serves A1111, closes at 5 s."""
JSON_BYTES_MAX = 16 * 1024 * 1024
"""Largest answer of `get_json`; ComfyUI's /object_info is 1 to 5 MB."""
_REPEATABLE = frozenset({"GET", "HEAD"})


class EngineClient:
    """Streams requests to one origin over kept connections."""

    def __init__(self, origin: str, *, connections_max: int = 64, timeouts: Timeouts | None = None) -> None:
        self.origin: Origin = parse_origin(origin)
        self._url = origin
        self._timeouts = timeouts or Timeouts()
        self._connections_max = connections_max
        self._slots = asyncio.Semaphore(connections_max)
        self._idle: deque[EngineConnection] = deque()
        self._busy: set[EngineConnection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def request(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | AsyncIterable[bytes] | None = None,
        *,
        content_length: int | None = None,
        timeouts: Timeouts | None = None,
        fresh: bool = False,
    ) -> EngineResponse:
        """Send a request and return its answer as soon as the head is here.

        `target` goes out as it is, behind the origin's base. `fresh`: a new connection. A length among
        `headers` is dropped: it is that of `body`, or `content_length` for a streamed one, chunked when None.
        """
        length = len(body) if isinstance(body, bytes) else content_length
        framing = Framing(has_body=body is not None, length=length)
        head = request_head(method, self.origin.base + target, self.origin.authority, headers, framing)
        is_repeatable = method in _REPEATABLE and body is None
        while True:
            exchange = Exchange(method, timeouts or self._timeouts)
            connection = await self._acquire(exchange.timeouts, fresh=fresh)
            is_kept = connection.exchanges_started > 0
            try:
                await self._converse(connection, exchange, head, body)
            except EngineDisconnected as error:
                if fresh or not is_kept or error.response_started or (error.sent and not is_repeatable):
                    raise
                fresh = True
                continue
            assert exchange.head is not None
            return EngineResponse(exchange, exchange.head)

    async def get_json(
        self, target: str, *, timeouts: Timeouts | None = None, body_bytes_max: int = JSON_BYTES_MAX
    ) -> tuple[int, bytes]:
        """GET a small document: its status and its whole body."""
        response = await self.request("GET", target, (("Accept", "application/json"),), timeouts=timeouts)
        async with response:
            return response.status, await response.read(body_bytes_max)

    async def upgrade(
        self, target: str, headers: Sequence[tuple[str, str]], *, timeouts: Timeouts | None = None
    ) -> UpgradedConnection | EngineResponse:
        """Ask to switch protocols, on a connection of its own; any answer but 101 comes back as it is.

        `headers` name the protocol (`Upgrade`); `Connection: Upgrade` is added. A tunnel counts no longer
        against `connections_max`.
        """
        asked = [*headers, ("Connection", "Upgrade")]
        if not any(name.lower() == "upgrade" for name, _ in headers):
            asked.append(("Upgrade", "websocket"))
        framing = Framing(has_body=False)
        head = request_head("GET", self.origin.base + target, self.origin.authority, asked, framing)
        exchange = Exchange("GET", timeouts or self._timeouts, wants_upgrade=True)
        connection = await self._acquire(exchange.timeouts, fresh=True)
        await self._converse(connection, exchange, head, None)
        assert exchange.head is not None
        if exchange.head.status != 101:
            return EngineResponse(exchange, exchange.head)
        self._let_go(connection)
        return UpgradedConnection(exchange.head, connection)

    async def close(self) -> None:
        """Close every connection but the upgraded; answers under way fail."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    # --- one exchange

    async def _converse(
        self,
        connection: EngineConnection,
        exchange: Exchange,
        head: bytes,
        body: bytes | AsyncIterable[bytes] | None,
    ) -> None:
        try:
            connection.start(exchange, head, body)
        except EngineDisconnected:
            self._let_go(connection)
            raise
        try:
            await exchange.head_ready
        except asyncio.CancelledError:
            exchange.close()
            if exchange.wants_upgrade:
                # A 101 may have come in this very moment, and then nobody else would close the socket.
                connection.close()
            raise

    # --- the pool: a slot is held from _acquire to _put_back or _let_go

    async def _acquire(self, timeouts: Timeouts, *, fresh: bool) -> EngineConnection:
        if self._is_closed:
            raise ConnectFailed(f"the client of {self._url} is closed")
        await self._take_slot(timeouts.connect_seconds)
        connection = None if fresh else self._pop_idle()
        try:
            connection = connection or await self._connect(timeouts.connect_seconds)
        except BaseException:
            self._slots.release()
            raise
        self._busy.add(connection)
        return connection

    async def _take_slot(self, seconds: float) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            async with asyncio.timeout(seconds):
                await self._slots.acquire()
        except TimeoutError:
            count = self._connections_max
            raise ConnectTimeout(f"all {count} connections to {self._url} are in use") from None

    def _pop_idle(self) -> EngineConnection | None:
        """Take the youngest kept connection that still works."""
        expired = asyncio.get_running_loop().time() - IDLE_SECONDS_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > expired and connection.is_usable:
                return connection
            connection.close()
        return None

    async def _connect(self, seconds: float) -> EngineConnection:
        if len(self._idle) + len(self._busy) >= self._connections_max and self._idle:
            self._idle.popleft().close()
        origin = self.origin
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: EngineConnection(self._put_back, self._let_go),
                    origin.host,
                    origin.port,
                    ssl=True if origin.is_tls else None,
                )
        except TimeoutError:
            raise ConnectTimeout(f"no connection to {self._url} within {seconds:g} s") from None
        except OSError as error:
            kind = ConnectRefused if is_refusal(error) else ConnectFailed
            raise kind(f"cannot connect to {self._url}: {error.strerror or error}") from error
        return connection

    def _put_back(self, connection: EngineConnection) -> None:
        self._busy.remove(connection)
        self._slots.release()
        if self._is_closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS_MAX, self._sweep)

    def _let_go(self, connection: EngineConnection) -> None:
        if connection in self._busy:
            self._busy.remove(connection)
            self._slots.release()
        elif connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close what has been idle for too long, and come back as long as something is kept."""
        self._sweeper = None
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since <= loop.time() - IDLE_SECONDS_MAX:
            self._idle.popleft().close()
        if self._idle:
            delay = self._idle[0].idle_since + IDLE_SECONDS_MAX - loop.time()
            self._sweeper = loop.call_later(max(delay, 0.05), self._sweep)
