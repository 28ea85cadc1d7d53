"""The relay between raw clients and raw engines."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from tests.integration.raw_engine import Peer, Script, raw_engine, until
from tests.integration.relay.front import front

pytestmark = pytest.mark.anyio


async def echo_head(peer: Peer) -> None:
    """Answer each request with its own head."""
    while head := await peer.head():
        await peer.body(head)
        await peer.answer(head.encode("latin-1"))


async def echo_body(peer: Peer) -> None:
    """Answer each request with its own body."""
    while head := await peer.head():
        await peer.answer(await peer.body(head))


def says(answer: bytes) -> Script:
    """Answer with these bytes and close."""

    async def script(peer: Peer) -> None:
        await peer.body(await peer.head())
        await peer.say(answer)

    return script


async def relayed(script: Script, request: bytes, *, prefix: str = "") -> tuple[str, bytes]:
    """Send a request through; return head and body of the answer."""
    async with raw_engine(script) as engine, front(engine.url, prefix=prefix) as server:
        answer = await server.say(request)
        head, _, body = answer.partition(b"\r\n\r\n")
        return head.decode("utf-8"), body


async def test_the_path_and_the_headers_arrive_as_they_were_sent() -> None:
    target = "/file=/abs/p%2Fath%20x/..;a=%E4%zz?q=a+b%20c&&%25=%ff"
    request = (
        f"GET /comfy{target} HTTP/1.1\r\nhost: us:1\r\nAccept-Encoding: gzip, br\r\nCookie: a=1; b=2\r\n"
        "Range: bytes=0-9\r\nOrigin: http://us:1\r\nReferer: http://us:1/\r\nSec-Fetch-Site: cross-site\r\n"
        "Connection: close, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    )
    async with raw_engine(echo_head) as engine, front(engine.url, prefix="/comfy") as server:
        answer = await server.say(request.encode())
        assert answer.partition(b"\r\n\r\n")[2].decode() == (
            f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{engine.port}\r\nAccept-Encoding: gzip, br\r\n"
            "Cookie: a=1; b=2\r\nRange: bytes=0-9\r\nX-Forwarded-For: 127.0.0.1\r\n"
            "X-Forwarded-Proto: http\r\nX-Forwarded-Host: us:1\r\n\r\n"
        )


async def test_the_answer_arrives_as_it_was_given() -> None:
    packed = gzip.compress(b"body")
    given = (
        f"HTTP/1.1 206 Pärt\r\nServer: Python/3.10 aiohttp\r\nset-cookie: a=1\r\nSet-Cookie: b=2\r\n"
        f"Content-Range: bytes 0-9/10\r\nContent-Encoding: gzip\r\nKeep-Alive: timeout=5\r\n"
        f'Content-Disposition: filename="ü.png"\r\nContent-Length: {len(packed)}\r\n\r\n'
    )
    request = b"GET / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n"
    head, body = await relayed(says(given.encode() + packed), request)
    assert body == packed
    assert head == (
        "HTTP/1.1 206 Pärt\r\nServer: Python/3.10 aiohttp\r\nset-cookie: a=1\r\nSet-Cookie: b=2\r\n"
        'Content-Range: bytes 0-9/10\r\nContent-Encoding: gzip\r\nContent-Disposition: filename="ü.png"\r\n'
        f"Content-Length: {len(packed)}\r\nConnection: close"
    )


@pytest.mark.parametrize(
    ("method", "answer", "head_end", "body"),
    [
        ("HEAD", b"200 OK\r\nContent-Length: 7\r\n\r\n", "Content-Length: 7", b""),
        ("HEAD", b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "200 OK", b""),
        ("GET", b"204 No Content\r\n\r\n", "204 No Content", b""),
        ("GET", b"304 Not Modified\r\nETag: 1\r\nContent-Length: 7\r\n\r\n", "Content-Length: 7", b""),
        ("GET", b"302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", "Content-Length: 0", b""),
        ("DELETE", b"200 OK\r\nContent-Length: 2\r\n\r\nok", "Content-Length: 2", b"ok"),
    ],
)
async def test_answers_without_a_body_keep_what_they_say(
    method: str, answer: bytes, head_end: str, body: bytes
) -> None:
    request = f"{method} / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n".encode()
    head, got = await relayed(says(b"HTTP/1.1 " + answer), request)
    assert got == body
    assert head.removesuffix("\r\nConnection: close").endswith(head_end)


async def test_a_body_that_ends_with_the_engines_connection_is_chunked() -> None:
    may_end = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\n\r\nuntil")
        await may_end.wait()
        await peer.say(b" the end")

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: us\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nuntil\r\n"
        assert await reader.readexactly(len(head)) == head
        may_end.set()
        assert await reader.readuntil(b"\r\n0\r\n\r\n") == b"8\r\n the end\r\n0\r\n\r\n"
        writer.close()


async def test_an_old_client_gets_no_chunks() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"

    async def slowly(peer: Peer) -> None:
        await peer.head()
        for index in range(len(chunked)):
            await peer.say(chunked[index : index + 1])
            await asyncio.sleep(0)

    head, body = await relayed(slowly, b"GET / HTTP/1.0\r\nHost: us\r\n\r\n")
    assert head.startswith("HTTP/1.0 200 OK") and "chunked" not in head
    assert body == b"abc"


async def test_a_redirect_leads_back_under_the_prefix() -> None:
    request = b"GET /sd/x HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n"
    answer = b"HTTP/1.1 307 T\r\nLocation: /login?x\r\nContent-Length: 0\r\n\r\n"
    head, _ = await relayed(says(answer), request, prefix="/sd")
    assert "Location: /sd/login?x\r\n" in head


async def test_one_connection_each_side_serves_many_requests() -> None:
    async with raw_engine(echo_body) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        for index in range(20):
            body = b"x" * (index * 1000)
            writer.write(b"POST / HTTP/1.1\r\nHost: us\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body
        writer.close()
        assert engine.connections == 1


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_twenty_megabytes_up_and_down(is_chunked: bool) -> None:
    piece = bytes(range(256)) * 256
    count = 320
    async with raw_engine(echo_body) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % (count * 65536)

        async def send() -> None:
            writer.write(b"POST / HTTP/1.1\r\nHost: us\r\n%b\r\nConnection: close\r\n\r\n" % framing)
            for _ in range(count):
                writer.write(b"10000\r\n%b\r\n" % piece if is_chunked else piece)
                await writer.drain()
            writer.write(b"0\r\n\r\n" if is_chunked else b"")

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert b"Content-Length: 20971520" in await reader.readuntil(b"\r\n\r\n")
            for _ in range(count):
                assert await reader.readexactly(65536) == piece
        assert await reader.read() == b""
        writer.close()


async def test_a_slow_client_makes_the_engine_wait() -> None:
    progress = [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (40 << 20))
        for _ in range(640):
            await peer.say(b"a" * 65536)
            progress[0] += 65536

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n")
        previous = -1
        while progress[0] != previous:
            previous = progress[0]
            await asyncio.sleep(0.1)
        assert progress[0] < 30 << 20  # four kernel buffers of up to 6 MiB, and ours
        size = 0
        while data := await reader.read(1 << 20):
            size += len(data)
        assert size > 40 << 20
        writer.close()


async def test_sse_passes_at_once() -> None:
    heard = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for index in range(3):
            await peer.say(b"data: %d\n\n" % index)
            await heard.wait()
            heard.clear()

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n")
        for index in range(3):  # each message before the next is even written
            await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % index), 5)
            heard.set()
        assert (await reader.read()).endswith(b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("is_cancelling", [False, True])
@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n"])
async def test_a_client_that_leaves_closes_the_engines_side(is_cancelling: bool, beginning: bytes) -> None:
    heard, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        heard.set()
        await peer.say(beginning)
        await peer.gone()
        gone.set()

    async with raw_engine(script) as engine, front(engine.url, is_cancelling=is_cancelling) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: us\r\n\r\n")
        await heard.wait()
        if beginning:
            await reader.readuntil(b"data: 1\n\n")
        writer.close()
        await asyncio.wait_for(gone.wait(), 5)


async def test_a_client_that_leaves_in_the_middle_of_an_upload_closes_the_engines_side() -> None:
    left: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        left.append(await peer.gone())

    async with raw_engine(script) as engine, front(engine.url) as server:
        _, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: us\r\nContent-Length: 100\r\n\r\nsome")
        await until(lambda: engine.connections == 1)
        writer.close()
        await until(lambda: bool(left))


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
async def test_an_engine_that_dies_in_the_middle_shows(beginning: bytes) -> None:
    request = b"GET / HTTP/1.1\r\nHost: us\r\n\r\n"
    async with raw_engine(says(beginning)) as engine, front(engine.url) as server:
        answer = await server.say(request)  # ends, since the server closes
        assert b"abc" in answer
        assert not answer.endswith(b"0\r\n\r\n")


async def test_an_engine_that_is_not_there_is_the_callers_to_tell() -> None:
    async with raw_engine(echo_head) as engine:
        url = engine.url
    async with front(url) as server:
        answer = await server.say(b"GET / HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502") and b"engine_unreachable" in answer


@pytest.mark.parametrize("framing", [b"Content-Length: 5000", b"Transfer-Encoding: chunked"])
async def test_an_upload_over_the_limit_is_refused(framing: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    body = b"1388\r\n" + b"x" * 5000 + b"\r\n0\r\n\r\n" if b"chunked" in framing else b"x" * 5000
    request = b"POST / HTTP/1.1\r\nHost: us\r\n%b\r\nConnection: close\r\n\r\n%b" % (framing, body)
    async with raw_engine(script) as engine, front(engine.url, body_bytes_max=4000) as server:
        assert (await server.say(request)).startswith(b"HTTP/1.1 413")


async def test_an_early_answer_reaches_a_client_that_is_still_sending() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.answer(b"no", status="413 Too Large")
        await peer.gone()

    async with raw_engine(script) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: us\r\nContent-Length: 100\r\n\r\nsome")
        assert b" 413 Too Large" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert await reader.readexactly(2) == b"no"
        writer.close()


@pytest.mark.parametrize("is_decoding", [False, True])
async def test_a_packed_upload_stays_sound(is_decoding: bool) -> None:
    packed = gzip.compress(b"x" * 300_000)
    request = (
        b"POST / HTTP/1.1\r\nHost: us\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n"
        b"Connection: close\r\n\r\n%b" % (len(packed), packed)
    )
    async with raw_engine(echo_body) as engine, front(engine.url, is_decoding=is_decoding) as server:
        body = (await server.say(request)).partition(b"\r\n\r\n")[2]
        assert body == (b"x" * 300_000 if is_decoding else packed)


async def test_expect_continue_is_answered_by_us() -> None:
    async with raw_engine(echo_head) as engine, front(engine.url) as server:
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: us\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        await reader.readuntil(b"\r\n\r\n")
        assert b"Expect" not in await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def test_two_lengths_are_refused() -> None:
    request = (
        b"POST / HTTP/1.1\r\nHost: us\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n0\r\n\r\n"
    )
    async with raw_engine(echo_head) as engine, front(engine.url) as server:
        assert (await server.say(request)).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert engine.connections == 0
