"""Relays one HTTP exchange, streaming in both directions; each side waits for the slower one.

It never buffers more than a few hundred KiB of either body, never retries (`wire` decides that) and never
changes a byte of a path or a body.
"""

from __future__ import annotations

from typing import Self

from aiohttp import StreamReader, web

from gpulane.errors import BadRequest, GpulaneError, TooLarge
from gpulane.relay.client_watch import ClientGone, ClientWatch
from gpulane.relay.headers import Forwarding, HeaderRules
from gpulane.relay.raw_response import RawResponse
from gpulane.wire import EngineClient, EngineResponse, Timeouts

CLIENT_GONE_STATUS = 499
"""nginx's number, for the access log; nobody is left to read it."""


async def relay_http(
    request: web.Request,
    client: EngineClient,
    *,
    target: str,
    rewrite: HeaderRules,
    body_bytes_max: int,
    is_proxy_trusted: bool = False,
    timeouts: Timeouts | None = None,
) -> web.StreamResponse:
    """Pass a request to the engine and its answer back.

    `target` is the path and query to ask the engine for, cut from `request.raw_path`. Raises WireError (its
    `status` is the one to answer) or ClientError while nothing has been answered yet; afterwards a failure
    cuts the client's connection, and the response's `failure` says why.
    """
    try:
        with ClientWatch(request):
            headers, body, length = await _take_body(
                request, rewrite, body_bytes_max, is_proxy_trusted=is_proxy_trusted
            )
            response = await client.request(
                request.method, target, headers, body, content_length=length, timeouts=timeouts
            )
            try:
                return await send_answer(request, response, rewrite)
            finally:
                await response.close()
    except web.RequestPayloadError as error:
        raise BadRequest("the request's body is broken") from error
    except (ClientGone, ConnectionError):
        # Neither is an engine's: those are WireErrors. Closing makes sure that no second head is written.
        request.protocol.force_close()
        return web.Response(status=CLIENT_GONE_STATUS)


async def send_answer(
    request: web.Request, response: EngineResponse, rewrite: HeaderRules
) -> web.StreamResponse:
    """Pass an engine's answer to the client as it comes."""
    whole = response.take_all()
    is_whole = whole is not None and request.method != "HEAD" and response.status != 304
    answer = RawResponse(
        status=response.status,
        reason=response.reason,
        raw_headers=rewrite.for_client(response.headers),
        length=len(whole) if whole is not None and is_whole else response.content_length,
        first=whole or b"",
    )
    await answer.prepare(request)
    if whole is None:
        await _stream(request, response, answer)
    else:
        await answer.write_eof()
    return answer


def forwarding_of(request: web.Request, *, is_trusted: bool) -> Forwarding:
    """Return who asks."""
    host = request.headers.get("Host", "")
    return Forwarding(address=request.remote, scheme=request.scheme, host=host, is_trusted=is_trusted)


def cut(request: web.Request, answer: RawResponse, error: Exception) -> None:
    """End the client's connection in a way that shows the body is not whole."""
    answer.failure = error
    transport = request.transport
    if answer.is_close_delimited and transport is not None:
        transport.abort()
    # Without the last chunk, or with fewer bytes than Content-Length, an ordinary close is truncation enough,
    # and what did come still arrives.
    request.protocol.force_close()


async def _stream(request: web.Request, response: EngineResponse, answer: RawResponse) -> None:
    try:
        while chunk := await response.next_chunk():
            await answer.write(chunk)
    except (GpulaneError, web.RequestPayloadError) as error:
        # The engine's side failed, or the rest of an upload that it had answered before its end.
        cut(request, answer, error)
    else:
        await answer.write_eof()


async def _take_body(
    request: web.Request, rewrite: HeaderRules, bytes_max: int, *, is_proxy_trusted: bool
) -> tuple[list[tuple[str, str]], bytes | Upload | None, int | None]:
    """Return the engine's headers, the body (bytes when it is all here) and its length when known."""
    forwarding = forwarding_of(request, is_trusted=is_proxy_trusted)
    headers = rewrite.for_engine(request.headers.items(), forwarding)
    if not request.body_exists:
        return headers, None, None
    length = request.content_length
    if length is not None and length > bytes_max:
        raise TooLarge(f"the body is over the limit of {bytes_max} bytes")
    content = request.content
    upload = Upload(content, bytes_max)
    if "Content-Encoding" in request.headers:
        await upload.peek()
        if content.total_compressed_bytes is not None:
            # The server was not told auto_decompress=False, so what we read is no longer what was declared.
            headers = [pair for pair in headers if pair[0].lower() != "content-encoding"]
            return headers, upload, None
    elif content.is_eof():
        return headers, upload.take_all(), None
    return headers, upload, length


class Upload:
    """The client's body, piece by piece, up to a limit."""

    def __init__(self, content: StreamReader, bytes_max: int) -> None:
        self._content = content
        self._bytes_max = bytes_max
        self._bytes = 0
        self._peeked: bytes | None = None

    async def peek(self) -> None:
        """Wait for the first piece and keep it."""
        self._peeked = await self._content.readany()

    def take_all(self) -> bytes:
        """Return what is here, for a body whose end is."""
        return self._count(self._content.read_nowait(-1))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = self._peeked if self._peeked is not None else await self._content.readany()
        self._peeked = None
        if not piece:
            raise StopAsyncIteration
        return self._count(piece)

    def _count(self, piece: bytes) -> bytes:
        self._bytes += len(piece)
        if self._bytes > self._bytes_max:
            raise TooLarge(f"the body is over the limit of {self._bytes_max} bytes")
        return piece
