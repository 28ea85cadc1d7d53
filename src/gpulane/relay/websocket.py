"""Tunnels an upgraded connection: after the 101 two sockets are spliced, byte for byte, and no frame is read.

Each side's reading stops while the other side cannot be written. aiohttp's server keeps accounting for the
connection; its protocol object only stops seeing the bytes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from aiohttp import web

from gpulane.errors import Unavailable
from gpulane.relay.client_watch import ClientGone, ClientWatch
from gpulane.relay.headers import HeaderRules
from gpulane.relay.http import CLIENT_GONE_STATUS, forwarding_of, send_answer
from gpulane.relay.raw_response import RawResponse
from gpulane.wire import EngineClient, EngineResponse, Timeouts, UpgradedConnection

if TYPE_CHECKING:
    from aiohttp.http_websocket import WebSocketReader

TUNNELS_MAX = 4096
IDLE_SECONDS = 6 * 3600.0
"""A tunnel without a byte for this long is closed: ComfyUI's sockets are silent while nothing runs."""
LINGER_SECONDS = 30.0
"""How long one side may take to read the rest after the other has gone."""
HANDSHAKE_TIMEOUTS = Timeouts(first_byte_seconds=60.0)
"""An engine that loads a model may hold its event loop for long."""
WRITE_BYTES_HIGH = 256 * 1024
"""Bytes that wait for a slow side before the other side's reading stops."""


class Tunnels:
    """The open tunnels of one server, so that a drain can close them."""

    def __init__(self, *, open_max: int = TUNNELS_MAX) -> None:
        self._open_max = open_max
        self._open: set[_Tunnel] = set()

    def __len__(self) -> int:
        return len(self._open)

    def close_all(self) -> None:
        """Close every tunnel, after what was already received has been sent."""
        for each in tuple(self._open):
            each.close()

    def check_room(self) -> None:
        """Refuse one more when all are taken."""
        if len(self._open) >= self._open_max:
            raise Unavailable("too many open WebSocket connections", retry_after_seconds=5.0)

    async def run(self, each: _Tunnel) -> None:
        """Hold a tunnel until both sides are closed."""
        self._open.add(each)
        try:
            await each.closed
        finally:
            each.abort()
            self._open.discard(each)


async def tunnel(
    request: web.Request,
    client: EngineClient,
    *,
    target: str,
    rewrite: HeaderRules,
    tunnels: Tunnels,
    idle_seconds: float = IDLE_SECONDS,
    is_proxy_trusted: bool = False,
) -> web.StreamResponse:
    """Pass an upgrade through and stay until the tunnel is closed.

    An answer other than 101 is relayed like any other. Raises like `relay_http` before that.
    """
    tunnels.check_room()
    forwarding = forwarding_of(request, is_trusted=is_proxy_trusted)
    headers = rewrite.for_engine(request.headers.items(), forwarding)
    protocol_name = request.headers.get("Upgrade", "websocket")
    headers.append(("Upgrade", protocol_name))
    try:
        with ClientWatch(request):
            upstream = await client.upgrade(target, headers, timeouts=HANDSHAKE_TIMEOUTS)
            if isinstance(upstream, EngineResponse):
                async with upstream:
                    return await send_answer(request, upstream, rewrite)
        return await _splice(request, upstream, protocol_name, rewrite, tunnels, idle_seconds)
    except (ClientGone, ConnectionError):
        request.protocol.force_close()
        return web.Response(status=CLIENT_GONE_STATUS)


async def _splice(
    request: web.Request,
    upstream: UpgradedConnection,
    protocol_name: str,
    rewrite: HeaderRules,
    tunnels: Tunnels,
    idle_seconds: float,
) -> web.StreamResponse:
    headers = rewrite.for_client(upstream.headers)
    headers += [("Connection", "Upgrade"), ("Upgrade", protocol_name)]
    answer = RawResponse(status=101, reason=upstream.reason, raw_headers=headers, length=None)
    answer.force_close()
    try:
        await answer.prepare(request)
    except BaseException:
        await upstream.close()
        raise
    transport = request.transport
    if transport is None or transport.is_closing():
        await upstream.close()
    else:
        await tunnels.run(_Tunnel(request, transport, upstream, idle_seconds))
    return answer


class _Tunnel:
    """Two spliced sockets; `closed` is set when both are gone."""

    def __init__(
        self,
        request: web.Request,
        transport: asyncio.Transport,
        upstream: UpgradedConnection,
        idle_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        early = _EarlyBytes()
        # The server's own seam for an upgraded protocol: it hands over what the client sent behind its head.
        request.protocol.set_parser(cast("WebSocketReader", early))
        engine_transport, leading = upstream.detach()
        self._client = _Side(self, transport, request.protocol)
        self._engine = _Side(self, engine_transport, None)
        self._client.splice(self._engine)
        self._engine.splice(self._client)
        if early.data:
            engine_transport.write(early.data)
        if leading:
            transport.write(leading)
        self.last_byte_at = self._loop.time()
        self._idle_seconds = idle_seconds
        self._idle_timer = self._loop.call_later(idle_seconds, self._check_idle)
        self._linger_timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Close both sides; what they do not read in time is dropped."""
        self._client.transport.close()
        self._engine.transport.close()
        if self._linger_timer is None:
            self._linger_timer = self._loop.call_later(LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """Close both sides at once."""
        self._client.transport.abort()
        self._engine.transport.abort()

    def side_lost(self) -> None:
        """One side is gone: the other follows when it has been sent everything."""
        if self._client.is_lost and self._engine.is_lost:
            self._idle_timer.cancel()
            if self._linger_timer is not None:
                self._linger_timer.cancel()
            if not self.closed.done():
                self.closed.set_result(None)
        else:
            self.close()

    def _check_idle(self) -> None:
        left = self.last_byte_at + self._idle_seconds - self._loop.time()
        if left <= 0:
            self.close()
        else:
            self._idle_timer = self._loop.call_later(left, self._check_idle)


class _Side(asyncio.Protocol):
    """One socket of a tunnel."""

    def __init__(
        self, tunnel: _Tunnel, transport: asyncio.Transport, server: asyncio.Protocol | None
    ) -> None:
        self._tunnel = tunnel
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.transport = transport
        self.is_lost = False
        self.is_ended = False
        """Its peer has said its last byte."""
        self.other: _Side = self

    def splice(self, other: _Side) -> None:
        """From now on what comes here goes there."""
        self.other = other
        self.transport.set_protocol(self)
        self.transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH)
        self.set_reading(wanted=True)

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        self._tunnel.last_byte_at = self._loop.time()
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        """Pass the end of this direction on; the other direction may go on, but not over TLS."""
        self.is_ended = True
        other = self.other.transport
        if self.other.is_ended or not (other.can_write_eof() and self.transport.can_write_eof()):
            self._tunnel.close()
            return False
        with suppress(RuntimeError, OSError):  # it is closing already
            other.write_eof()
        return True

    def pause_writing(self) -> None:
        """This side is slow."""
        self.other.set_reading(wanted=False)

    def resume_writing(self) -> None:
        """This side has caught up."""
        self.other.set_reading(wanted=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the tunnel, and aiohttp's server, which still counts this connection as its own."""
        self.is_lost = True
        if self._server is not None:
            self._server.connection_lost(exc)
        self._tunnel.side_lost()

    def set_reading(self, *, wanted: bool) -> None:
        if self.transport.is_closing() or self.is_ended:
            return
        if wanted:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()


class _EarlyBytes:
    """Takes the place of aiohttp's WebSocket parser for the moment in which the socket changes hands."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Nothing to do: the side that has taken over is told itself."""
