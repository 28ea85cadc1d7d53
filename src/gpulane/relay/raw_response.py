"""An aiohttp response whose head goes out as the engine wrote it.

aiohttp would add Content-Type, Date and Server and re-encode values; here only the framing and Connection are
ours. Headers set on it before it is prepared (by signals of the application) are sent behind the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import HttpVersion11, web

from gpulane.wire.head import HEADER_ENCODING, HEADER_ERRORS

_BODILESS_STATUSES = frozenset({101, 204, 304})
_LENGTHLESS_STATUSES = frozenset({101, 204})
"""RFC 9110 section 8.6: these must not carry Content-Length; 304 and answers to HEAD may."""
COALESCE_BYTES_MAX = 64 * 1024
"""A body up to this size is written together with its head."""


class RawResponse(web.StreamResponse):
    """The answer to one request. `first` is the body's beginning, `is_whole` says that it is all of it."""

    def __init__(
        self,
        *,
        status: int,
        reason: str,
        raw_headers: Sequence[tuple[str, str]],
        length: int | None,
        first: bytes = b"",
    ) -> None:
        super().__init__(status=status, reason=reason)
        self._raw_headers = raw_headers
        self._length = length
        self._first = first
        self.is_close_delimited = False
        """The client can tell the end of the body only by the connection's."""
        self.failure: Exception | None = None
        """Why the body was cut short after its head had gone out."""

    async def _prepare_headers(self) -> None:
        """Decide on framing and on keeping the connection; aiohttp's version also adds headers."""
        request = self._req
        assert request is not None
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        is_bodiless = request.method == "HEAD" or self.status in _BODILESS_STATUSES
        if not is_bodiless and self._length is None:
            self._chunked = request.version >= HttpVersion11
            self.is_close_delimited = not self._chunked
        if self.is_close_delimited:
            self._keep_alive = False

    async def _write_headers(self) -> None:
        writer = self._payload_writer
        assert writer is not None
        head = self._head()
        if self._chunked:
            await writer.write(head)
            writer.enable_chunking()
            if self._first:
                await writer.write(self._first)
        elif len(self._first) <= COALESCE_BYTES_MAX:
            await writer.write(head + self._first)
        else:
            await writer.write(head)
            await writer.write(self._first)

    def _head(self) -> bytes:
        request = self._req
        assert request is not None
        is_http11 = request.version >= HttpVersion11
        given = [*self._raw_headers, *self._headers.items()] if self._headers else self._raw_headers
        lines = "".join([f"{name}: {value}\r\n" for name, value in given])
        if lines.count("\n") != len(given) or lines.count("\r") != len(given) or "\0" in lines:
            raise ValueError("line break or NUL in a header")
        if self._chunked:
            lines += "Transfer-Encoding: chunked\r\n"
        elif self._length is not None and self.status not in _LENGTHLESS_STATUSES:
            lines += f"Content-Length: {self._length}\r\n"
        if self.status != 101 and is_http11 is not self._keep_alive:
            lines += "Connection: keep-alive\r\n" if self._keep_alive else "Connection: close\r\n"
        version = "HTTP/1.1" if is_http11 else "HTTP/1.0"
        text = f"{version} {self.status} {self.reason}\r\n{lines}\r\n"
        return text.encode(HEADER_ENCODING, HEADER_ERRORS)
