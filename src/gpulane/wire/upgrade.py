"""A connection after a 101: raw bytes both ways, with back-pressure, never parsed."""

from __future__ import annotations

import asyncio
from collections import deque

from gpulane.wire.connection import EngineConnection
from gpulane.wire.errors import EngineDisconnected
from gpulane.wire.exchange import BUFFER_BYTES_HIGH, Head


class UpgradedConnection(asyncio.Protocol):
    """The engine's side of a tunnel: either read and written here, or handed on by `detach`."""

    def __init__(self, head: Head, connection: EngineConnection) -> None:
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        self._transport, leading, self._is_write_paused = connection.take_transport()
        self._chunks: deque[bytes] = deque([leading] if leading else ())
        self._buffered_bytes = len(leading)
        self._is_eof = False
        self._lost: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def read(self) -> bytes:
        """Return what has come, first of all the bytes behind the head; b"" once the engine has ended."""
        while not self._chunks:
            if self._lost is not None:
                raise EngineDisconnected(str(self._lost), response_started=True)
            if self._is_eof:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered_bytes = 0
        if not self._transport.is_closing():
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Send, waiting while the engine is slow."""
        if self._transport.is_closing():
            raise EngineDisconnected(response_started=True)
        self._transport.write(data)
        while self._is_write_paused:
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def write_eof(self) -> None:
        """Say that no more follows, where the transport can (not over TLS)."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    async def close(self) -> None:
        """Close, after what was written has been sent."""
        self._transport.close()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Give the socket away, not reading, with the bytes that came so far.

        The caller sets its new protocol and resumes reading.
        """
        if not self._transport.is_closing():
            self._transport.pause_reading()
        leading = b"".join(self._chunks)
        self._chunks.clear()
        return self._transport, leading

    # --- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """Keep it for the reader, within the limit."""
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes > BUFFER_BYTES_HIGH:
            self._transport.pause_reading()
        self._wake(self._reader)

    def eof_received(self) -> bool:
        """Keep our direction open: the other may still have something to say."""
        self._is_eof = True
        self._wake(self._reader)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake whoever waits."""
        self._is_eof = True
        self._lost = exc
        self._wake(self._reader)
        self.resume_writing()

    def pause_writing(self) -> None:
        """The engine reads more slowly than we write."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """The engine has caught up."""
        self._is_write_paused = False
        self._wake(self._drained)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
