"""The client against engines that speak well, badly, late, in pieces, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpulane.wire import (
    ConnectFailed,
    ConnectTimeout,
    EngineClient,
    EngineDisconnected,
    EngineTimeout,
    MalformedResponse,
    ResponseTooLarge,
    Timeouts,
)
from tests.integration.raw_engine import Peer, Script, raw_engine, until

pytestmark = pytest.mark.anyio

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"


async def echo_head(peer: Peer) -> None:
    """Answer each request with its own head."""
    while head := await peer.head():
        await peer.body(head)
        await peer.answer(head.encode("latin-1"))


def says(*pieces: bytes) -> Script:
    """Answer the first request with these bytes, each in a segment of its own, then close."""

    async def script(peer: Peer) -> None:
        await peer.head()
        for piece in pieces:
            await peer.say(piece)
            await asyncio.sleep(0)
        peer.writer.close()

    return script


async def fetch(script: Script, method: str = "GET", timeouts: Timeouts | None = None) -> tuple[int, bytes]:
    """One request to a script: status and body."""
    async with raw_engine(script) as engine:
        client = EngineClient(engine.url, timeouts=timeouts)
        try:
            response = await client.request(method, "/")
            return response.status, await response.read(1 << 26)
        finally:
            await client.close()


async def test_a_connection_is_kept_and_used_again() -> None:
    async with raw_engine(echo_head) as engine:
        client = EngineClient(engine.url)
        for _ in range(5):
            async with await client.request("GET", "/x") as response:
                assert await response.read(1000)
        assert engine.connections == 1
        async with await client.request("POST", "/x", body=b"abc", fresh=True) as response:
            await response.read(1000)
        assert engine.connections == 2
        await client.close()


async def test_the_target_goes_out_untouched_and_headers_keep_order_and_case() -> None:
    async with raw_engine(echo_head) as engine:
        client = EngineClient(engine.url)
        target = "/file=/abs/p%2Fath%20x//..;a=%e4?q=a+b%20c&&é"
        headers = (("X-B", "1"), ("x-a", "ü"), ("X-B", "2"), ("Content-Length", "99"))
        async with await client.request("POST", target, headers, b"hi") as response:
            body = await response.read(10_000)
        assert body.decode("utf-8") == (
            f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{engine.port}\r\nX-B: 1\r\nx-a: ü\r\nX-B: 2\r\n"
            "Content-Length: 2\r\n\r\n"
        )
        await client.close()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: 1\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc", b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", b""),
        (INTERIM + b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\na", b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)  # fmt: skip
async def test_every_way_a_body_can_end(answer: bytes, body: bytes) -> None:
    expected = (int(answer.rsplit(b"HTTP/1.", 1)[1][2:5]), body)
    assert await fetch(says(answer)) == expected
    assert await fetch(says(*(answer[i : i + 1] for i in range(len(answer))))) == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
    ],
)
async def test_a_truncated_answer_is_never_taken_for_whole(answer: bytes) -> None:
    with pytest.raises(EngineDisconnected) as caught:
        await fetch(says(answer), "POST")
    assert caught.value.sent
    assert caught.value.response_started is bool(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\nabc",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ],
)
async def test_an_unsound_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(MalformedResponse):
        await fetch(says(answer))


async def test_an_endless_head_is_refused() -> None:
    with pytest.raises(ResponseTooLarge):
        await fetch(says(b"HTTP/1.1 200 OK\r\nX: ", *([b"a" * 8192] * 40)))
    with pytest.raises(ResponseTooLarge):
        await fetch(says(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n"))


async def test_a_body_over_the_limit_is_abandoned() -> None:
    async with raw_engine(says(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n" + b"a" * 5000)) as engine:
        client = EngineClient(engine.url)
        with pytest.raises(ResponseTooLarge):
            await client.get_json("/", body_bytes_max=4000)
        await client.close()


async def test_head_needs_no_body_and_keeps_its_connection() -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        for _ in range(3):
            async with await client.request("HEAD", "/") as response:
                assert (response.content_length, await response.read(1)) == (1000, b"")
        assert engine.connections == 1
        await client.close()


async def test_bytes_behind_an_answer_end_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
        )
        await peer.gone()

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        for count in (1, 2):
            async with await client.request("GET", "/") as response:
                assert await response.read(10) == b"a"
            assert engine.connections == count
        await client.close()


async def dies_after_one(peer: Peer) -> None:
    """Answer one request on a kept connection, read the second and close without a word."""
    head = await peer.head()
    await peer.body(head)
    await peer.answer(b"ok")
    await peer.body(await peer.head())


async def test_a_get_is_repeated_once_when_a_kept_connection_turns_out_dead() -> None:
    async with raw_engine(dies_after_one) as engine:
        client = EngineClient(engine.url)
        for _ in range(2):
            async with await client.request("GET", "/") as response:
                assert await response.read(10) == b"ok"
        assert engine.connections == 2
        await client.close()


async def test_a_post_is_never_repeated_once_sent() -> None:
    async with raw_engine(dies_after_one) as engine:
        client = EngineClient(engine.url)
        async with await client.request("POST", "/", body=b"1") as response:
            await response.read(10)
        with pytest.raises(EngineDisconnected) as caught:
            await client.request("POST", "/", body=b"2")
        assert (caught.value.sent, caught.value.response_started) == (True, False)
        assert engine.connections == 1
        await client.close()


async def test_a_connection_closed_while_idle_is_not_used() -> None:
    async def script(peer: Peer) -> None:
        await peer.body(await peer.head())
        await peer.answer(b"ok")

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        for count in (1, 2, 3):
            async with await client.request("POST", "/", body=b"1") as response:
                await response.read(10)
            assert engine.connections == count
            # The FIN is in the kernel, while our loop has not yet been told of it.
        await client.close()


async def test_nobody_listens() -> None:
    async with raw_engine(echo_head) as engine:
        url = engine.url
    client = EngineClient(url)
    with pytest.raises(ConnectFailed) as caught:
        await client.request("GET", "/")
    assert not caught.value.sent


async def test_the_pool_is_bounded_and_waiting_for_it_too() -> None:
    async with raw_engine(echo_head) as engine:
        client = EngineClient(engine.url, connections_max=2, timeouts=Timeouts(connect_seconds=0.1))
        held = [await client.request("GET", "/" + "a" * 600_000) for _ in range(2)]
        with pytest.raises(ConnectTimeout):
            await client.request("GET", "/")
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(client.request("GET", "/", timeouts=Timeouts(connect_seconds=5)))
            await asyncio.sleep(0)
            await held[0].close()
            assert len(await held[1].read(1 << 20)) > 600_000
        await (await waiting).close()
        assert engine.connections <= 3
        await client.close()


async def test_first_byte_and_idle_time_out_on_their_own() -> None:
    async def mute(peer: Peer) -> None:
        await peer.gone()

    with pytest.raises(EngineTimeout) as caught:
        await fetch(mute, timeouts=Timeouts(first_byte_seconds=0.05))
    assert caught.value.phase == "first_byte"

    async def stalls(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await peer.gone()

    with pytest.raises(EngineTimeout) as caught:
        await fetch(stalls, timeouts=Timeouts(idle_seconds=0.05))
    assert caught.value.phase == "idle"


async def test_an_engine_that_stops_reading_times_out_too() -> None:
    stop = asyncio.Event()

    async def script(peer: Peer) -> None:
        await stop.wait()

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url, timeouts=Timeouts(idle_seconds=0.2))
        with pytest.raises(EngineTimeout) as caught:
            await client.request("POST", "/", (), b"x" * 50_000_000)
        assert caught.value.phase == "idle"
        stop.set()
        await client.close()


async def test_no_connection_is_left_behind() -> None:
    """Two hundred exchanges that end in every way leave no descriptor and no slot."""

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            if "/short" in head:
                await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
                return
            if "/junk" in head:
                await peer.say(b"junk\r\n\r\n")
                return
            if "/mute" in head:
                await peer.gone()
                return
            await peer.answer(b"ok")

    async def one(client: EngineClient, index: int) -> None:
        target = ("/ok", "/short", "/junk", "/mute", "/close")[index % 5]
        try:
            async with await client.request("GET", target) as response:
                if target != "/close":
                    await response.read(100)
        except (EngineDisconnected, MalformedResponse, EngineTimeout):
            assert target in {"/short", "/junk", "/mute"}

    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    async with raw_engine(script) as engine:
        first = EngineClient(engine.url)
        await first.get_json("/ok")
        await first.close()
        before = descriptors()  # by now the event loop has opened its own
        timeouts = Timeouts(first_byte_seconds=0.3, connect_seconds=10)
        client = EngineClient(engine.url, connections_max=8, timeouts=timeouts)
        await asyncio.gather(*(one(client, index) for index in range(200)))
        # All slots are free again: as many at once as the pool allows.
        responses = await asyncio.gather(*(client.request("GET", "/ok") for _ in range(8)))
        assert [await response.read(100) for response in responses] == [b"ok"] * 8
        await client.close()
        await until(lambda: descriptors() <= before)


async def test_a_slow_reader_makes_the_engine_wait() -> None:
    total = 20 * 1024 * 1024
    progress = [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // 65536):
            await peer.say(b"a" * 65536)
            progress[0] += 65536

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        response = await client.request("GET", "/")
        previous = -1
        while progress[0] != previous:  # until the engine gets no further
            previous = progress[0]
            await asyncio.sleep(0.1)
        assert progress[0] < 16 * 1024 * 1024  # our buffer and both kernels'
        size = 0
        async for chunk in response.chunks():
            assert len(chunk) <= 768 * 1024
            size += len(chunk)
        assert size == total
        await client.close()


async def pieces(count: int, size: int = 65536) -> AsyncIterator[bytes]:
    """A streamed body."""
    for index in range(count):
        yield bytes([index % 251]) * size


@pytest.mark.parametrize("content_length", [None, 320 * 65536])
async def test_twenty_megabytes_up_and_down(content_length: int | None) -> None:
    async def script(peer: Peer) -> None:
        while head := await peer.head():
            assert ("chunked" in head) is (content_length is None and "X-Whole" not in head)
            await peer.answer(await peer.body(head))

    whole = b"".join([piece async for piece in pieces(320)])
    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        async with await client.request(
            "POST", "/", (), pieces(320), content_length=content_length
        ) as response:
            assert await response.read(1 << 26) == whole
        async with await client.request("POST", "/", (("X-Whole", "1"),), whole) as response:
            assert await response.read(1 << 26) == whole
        assert engine.connections == 1
        await client.close()


async def test_an_early_answer_is_seen_while_the_body_is_still_coming() -> None:
    asked_on = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"first"
        await asked_on.wait()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.answer(b"too large", status="413 Too Large")
        await peer.gone()

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        async with await client.request("POST", "/", (), endless()) as response:
            assert (response.status, await response.read(100)) == (413, b"too large")
            assert not response.request_was_sent
        async with await client.request("POST", "/", (), b"x" * 50_000_000) as response:
            assert (response.status, await response.read(100)) == (413, b"too large")
        assert engine.connections == 2  # half a request was left on the first
        await client.close()


async def test_a_body_that_fails_fails_the_request_and_closes() -> None:
    heard = asyncio.Event()

    async def failing() -> AsyncIterator[bytes]:
        yield b"some"
        raise ConnectionResetError("the client left")

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()
        heard.set()

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        with pytest.raises(ConnectionResetError, match="the client left"):
            await client.request("POST", "/", (), failing())
        await asyncio.wait_for(heard.wait(), 5)
        await client.close()


async def test_cancelling_or_closing_closes_the_connection() -> None:
    gone = [0]

    async def script(peer: Peer) -> None:
        head = await peer.head()
        if "/slow" not in head:
            await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await peer.gone()
        gone[0] += 1

    async with raw_engine(script) as engine:
        client = EngineClient(engine.url)
        response = await client.request("GET", "/")
        await response.close()
        await until(lambda: gone[0] == 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.request("GET", "/slow")
        await until(lambda: gone[0] == 2)
        await client.close()
