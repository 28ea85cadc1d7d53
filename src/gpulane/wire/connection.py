"""One keep-alive connection to an engine: bytes to callbacks, one exchange at a time.

It decides alone whether it may serve another exchange (`on_free`) or is done (`on_closed`); when in doubt
it closes. httptools is strict by default (llhttp refuses Content-Length beside Transfer-Encoding, bare LF,
space before the colon) and must stay so.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable
from functools import lru_cache
from typing import cast

import httptools

from gpulane.wire.errors import (
    EngineDisconnected,
    EngineTimeout,
    MalformedResponse,
    ResponseTooLarge,
    WireError,
)
from gpulane.wire.exchange import BUFFER_BYTES_HIGH, Exchange, Head
from gpulane.wire.head import HEADER_ENCODING, HEADER_ERRORS

HEAD_BYTES_MAX = 64 * 1024
"""Bytes before the end of a head, interim (1xx) heads included."""
HEADERS_MAX = 256
"""Header lines of a head, and of trailers."""
WRITE_BYTES_HIGH = 256 * 1024
"""Bytes of request waiting in the transport before a body's sender has to wait."""
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)
"""A machine that vanished is noticed within 90 s although a job may be silent for an hour; a busy engine's
kernel answers for it."""
_SWITCHING_PROTOCOLS = 101
_BODILESS_STATUSES = frozenset({_SWITCHING_PROTOCOLS, 204, 304})


class EngineConnection(asyncio.Protocol):
    """The protocol object of one socket. Owned by the client's pool."""

    def __init__(
        self, on_free: Callable[[EngineConnection], None], on_closed: Callable[[EngineConnection], None]
    ) -> None:
        self._on_free = on_free
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._poll: select.poll | None = None
        self._exchange: Exchange | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_write_paused = False
        self._is_read_paused = False
        self.exchanges_started = 0
        self.idle_since = 0.0
        """Loop time, set by the pool."""
        self._leading: bytes | None = None
        self._new_parser()
        self._new_head()

    # --- called by the pool

    @property
    def is_usable(self) -> bool:
        """Whether a request may be written: open, and the engine has neither closed nor said anything.

        The engine's FIN may lie in the kernel before the event loop has told us; asking costs 1 us and saves
        a request that could not be repeated.
        """
        if self._transport is None or self._transport.is_closing():
            return False
        return self._poll is None or not self._poll.poll(0)

    def close(self) -> None:
        """Close now; an exchange under way fails."""
        if self._transport is not None:
            self._transport.abort()
        self._fail("closed by us")

    def start(self, exchange: Exchange, head: bytes, body: bytes | AsyncIterable[bytes] | None) -> None:
        """Write the request; a streamed body goes on in a task that ends with the exchange."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise EngineDisconnected(sent=False)
        self.exchanges_started += 1
        self._exchange = exchange
        exchange.abandon = self.close
        exchange.is_sent = True
        self._new_head()
        if body is None:
            transport.write(head)
            exchange.sent_whole()
        elif isinstance(body, bytes):
            transport.write(head + body if len(body) < WRITE_BYTES_HIGH else head)
            if len(body) < WRITE_BYTES_HIGH:
                exchange.sent_whole()
            else:
                self._start_upload(exchange, _slices(body), is_chunked=False)
        else:
            transport.write(head)
            self._start_upload(exchange, body, is_chunked=b"\r\nTransfer-Encoding: chunked\r\n" in head)

    def take_transport(self) -> tuple[asyncio.Transport, bytes, bool]:
        """After a 101: give the socket away; the bytes behind the head; whether writing is paused."""
        if self._transport is None or self._leading is None:
            raise EngineDisconnected(response_started=True)
        transport, leading = self._transport, self._leading
        self._transport = None
        return transport, leading, self._is_write_paused

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the socket."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH)
        sock: socket.socket = transport.get_extra_info("socket")
        for level, option, value in _KEEPALIVE:
            sock.setsockopt(level, option, value)
        if transport.get_extra_info("sslcontext") is None:
            # TLS may have records of its own waiting, so readable proves nothing there.
            self._poll = select.poll()
            self._poll.register(sock.fileno(), select.POLLIN | select.POLLHUP)

    def data_received(self, data: bytes) -> None:
        """Parse; whatever the engine says while nothing was asked ends the connection."""
        exchange = self._exchange
        if exchange is None:
            self._receive_unasked(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch_protocols(exchange, data[int(upgrade.args[0]) :])
            return
        except httptools.HttpParserError as error:
            if not self._is_complete:
                self._fail(f"the engine's answer is not sound HTTP: {error}", MalformedResponse)
            self._can_reuse = False
        self._after_feed(exchange, len(data))

    def eof_received(self) -> None:
        """Complete a body that ends with the connection; anything else is truncated."""
        if self._is_until_eof and self._exchange is not None:
            self._can_reuse = False
            self._complete(self._exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what was under way and leave the pool."""
        self._transport = None
        self._poll = None
        if self._is_until_eof and exc is None and self._exchange is not None:
            self._can_reuse = False
            self._complete(self._exchange)
        self._fail(str(exc) if exc else "the engine closed the connection")
        self.resume_writing()
        self._on_closed(self)

    def pause_writing(self) -> None:
        """The engine reads more slowly than we write."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """The engine has caught up."""
        self._is_write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # --- httptools callbacks; they must not raise

    def on_message_begin(self) -> None:
        """A second message behind the first was never asked for."""
        if self._is_complete:
            self._can_reuse = False

    def on_status(self, status: bytes) -> None:
        """Collect the reason phrase."""
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; trailers are dropped."""
        if len(self._headers) < HEADERS_MAX:
            self._headers.append((name, value))
        else:
            self._is_head_too_large = True

    def on_headers_complete(self) -> None:
        """Tell the exchange, unless it is an interim answer."""
        status = self._parser.get_status_code()
        self._is_interim = status < 200 and status != _SWITCHING_PROTOCOLS
        if self._is_interim or self._is_complete or self._exchange is None or self._is_head_too_large:
            self._headers.clear()
            self._reason = b""
            return
        self._has_head = True
        self._read_head(self._exchange, status)

    def on_body(self, data: bytes) -> None:
        """Pass a piece of the body on."""
        if self._is_complete or self._exchange is None:
            self._can_reuse = False
        else:
            self._exchange.receive_body(data)

    def on_message_complete(self) -> None:
        """The answer has ended, if it was the final one."""
        if self._is_interim:
            self._is_interim = False
        elif self._has_head:
            self._is_complete = True

    # --- inside

    def _new_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)

    def _new_head(self) -> None:
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._has_head = False
        self._is_head_too_large = False
        self._is_interim = False
        self._is_complete = False
        self._is_until_eof = False
        self._can_reuse = True

    def _read_head(self, exchange: Exchange, status: int) -> None:
        head, is_chunked, is_sound = _read_head(status, self._reason, self._headers)
        self._headers = []
        if status == _SWITCHING_PROTOCOLS:
            is_sound = is_sound and exchange.wants_upgrade and self._parser.should_upgrade()
        if not is_sound:
            self._fail("the engine's answer is framed in a way nobody asked for", MalformedResponse)
            return
        has_body = exchange.method != "HEAD" and status not in _BODILESS_STATUSES
        if exchange.method == "HEAD":
            # llhttp cannot be told that no body follows, so it is thrown away after this head.
            self._is_complete = True
            self._can_reuse = not _says_close(head) and self._parser.get_http_version() == "1.1"
        else:
            self._can_reuse = self._parser.should_keep_alive()
            self._is_until_eof = has_body and head.length is None and not is_chunked
        exchange.receive_head(head)

    def _after_feed(self, exchange: Exchange, fed_bytes: int) -> None:
        if self._exchange is not exchange:
            return
        if self._is_complete:
            self._complete(exchange)
            return
        if not self._has_head or self._is_head_too_large:
            self._head_bytes += fed_bytes
            if self._head_bytes > HEAD_BYTES_MAX or self._is_head_too_large:
                self._fail("the head of the engine's answer is too large", ResponseTooLarge)
        elif exchange.buffered_bytes > BUFFER_BYTES_HIGH and not self._is_read_paused:
            self._pause_reading(exchange)

    def _pause_reading(self, exchange: Exchange) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._is_read_paused = True
            exchange.on_drained = self._resume_reading
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._is_read_paused and self._transport is not None and not self._transport.is_closing():
            self._is_read_paused = False
            if self._exchange is not None:
                self._exchange.on_drained = None
            self._transport.resume_reading()

    def _complete(self, exchange: Exchange) -> None:
        """The answer's last byte is here: whatever its reader does, the connection is free or closed."""
        can_reuse = self._can_reuse and exchange.is_sent_whole
        if exchange.method == "HEAD":
            self._new_parser()
        self._exchange = None
        self._is_until_eof = False
        exchange.finish()
        if can_reuse and self._transport is not None and not self._transport.is_closing():
            self._on_free(self)
        elif self._transport is not None and exchange.is_sent_whole:
            self._transport.close()
        elif self._transport is not None:
            # close() would wait for the engine to read a body it has already answered.
            self._transport.abort()

    def _fail(self, message: str, kind: type[WireError] = EngineDisconnected) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        self._exchange = None
        self._is_until_eof = False
        if kind is EngineDisconnected:
            started = self._has_head or self._head_bytes > 0
            exchange.finish(EngineDisconnected(message, sent=exchange.is_sent, response_started=started))
        else:
            exchange.finish(kind(message))
        if self._transport is not None:
            self._transport.abort()

    def _receive_unasked(self, data: bytes) -> None:
        if self._leading is not None:
            # Between the 101 and the moment its new owner takes the socket; reading is paused, so this is
            # at most what the loop had already read.
            self._leading += data
        elif self._transport is not None:
            self._transport.abort()

    def _switch_protocols(self, exchange: Exchange, rest: bytes) -> None:
        if self._exchange is not exchange or not self._has_head or self._transport is None:
            self._fail("the engine switched protocols unasked", MalformedResponse)
            return
        self._leading = rest
        self._transport.pause_reading()
        self._exchange = None
        exchange.finish()

    def _start_upload(self, exchange: Exchange, body: AsyncIterable[bytes], *, is_chunked: bool) -> None:
        # Not a TaskGroup: the answer may come, and be read, while the body is still being sent. The exchange
        # cancels the task when it ends, and the task routes every failure into the exchange.
        exchange.upload = asyncio.create_task(self._upload(exchange, body, is_chunked=is_chunked))

    async def _upload(self, exchange: Exchange, body: AsyncIterable[bytes], *, is_chunked: bool) -> None:
        try:
            async for piece in body:
                if not piece:
                    continue
                self._write_piece(piece, is_chunked=is_chunked)
                if self._is_write_paused:
                    await self._drain(exchange.timeouts.idle_seconds)
            if is_chunked:
                self._write(b"0\r\n\r\n")
            exchange.sent_whole()
        except Exception as error:  # noqa: BLE001 - the caller of request() or the body's reader gets it
            exchange.finish(error)
            self.close()

    def _write_piece(self, piece: bytes, *, is_chunked: bool) -> None:
        if not is_chunked:
            self._write(piece)
        elif len(piece) < 4096:
            self._write(b"%x\r\n%b\r\n" % (len(piece), piece))
        else:
            self._write(b"%x\r\n" % len(piece))
            self._write(piece)
            self._write(b"\r\n")

    def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise EngineDisconnected(response_started=self._has_head)
        self._transport.write(data)

    async def _drain(self, idle_seconds: float | None) -> None:
        self._drained = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(idle_seconds):
                await self._drained
        except TimeoutError:
            raise EngineTimeout("idle", idle_seconds or 0.0) from None
        finally:
            self._drained = None


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), WRITE_BYTES_HIGH):
        yield body[start : start + WRITE_BYTES_HIGH]


def _read_head(status: int, reason: bytes, raw_headers: list[tuple[bytes, bytes]]) -> tuple[Head, bool, bool]:
    """Return the head, whether the body is chunked, and whether its framing can be trusted."""
    length: int | None = None
    is_chunked = False
    is_sound = True
    headers: list[tuple[str, str]] = []
    for raw_name, raw_value in raw_headers:
        name, lower = _name(raw_name)
        # llhttp leaves spaces behind a value (RFC 9110 section 5.5).
        value = raw_value.decode(HEADER_ENCODING, HEADER_ERRORS).rstrip(" \t")
        headers.append((name, value))
        if lower == "content-length":
            # llhttp has refused everything but one decimal number.
            length = int(value)
        elif lower == "transfer-encoding":
            # Other codings would reach the client undecoded and unnamed, since the field is hop-by-hop.
            is_sound = is_sound and not is_chunked and value.lower() == "chunked"
            is_chunked = True
    text = reason.decode(HEADER_ENCODING, HEADER_ERRORS)
    return (
        Head(status=status, reason=text, headers=tuple(headers), length=length),
        is_chunked,
        is_sound and not (is_chunked and length is not None),
    )


@lru_cache(maxsize=1024)
def _name(raw: bytes) -> tuple[str, str]:
    """Decode a header's name, once for the thirty that engines use; llhttp lets only tokens through."""
    name = raw.decode("ascii", HEADER_ERRORS)
    return name, name.lower()


def _says_close(head: Head) -> bool:
    return any(name.lower() == "connection" and "close" in value.lower() for name, value in head.headers)
