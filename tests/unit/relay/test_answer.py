"""An answer is written once and read often."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpulane.errors import StoreError
from gpulane.relay import AnswerGone, HeldAnswer
from gpulane.wire import EngineDisconnected, ResponseTooLarge

pytestmark = pytest.mark.anyio

PIECE = bytes(range(256)) * 16


async def read(answer: HeldAnswer) -> bytes:
    """All of it."""
    return b"".join([chunk async for chunk in answer.chunks()])


@pytest.mark.parametrize(
    ("pieces", "is_spooled"), [(0, False), (3, False), (16, False), (17, True), (400, True)]
)
async def test_every_reader_gets_the_whole(tmp_path: Path, pieces: int, is_spooled: bool) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=1 << 30, memory_bytes_max=16 * len(PIECE))
    async with asyncio.TaskGroup() as group:
        early = [group.create_task(read(answer)) for _ in range(3)]
        head = group.create_task(answer.wait_head())
        await asyncio.sleep(0)
        answer.begin(200, [("A", "b")])
        for index in range(pieces):
            answer.write(PIECE)
            if index % 5 == 0:
                await asyncio.sleep(0)
        answer.finish()
    whole = PIECE * pieces
    assert [task.result() for task in early] == [whole] * 3
    assert head.result() == await answer.wait_head() == (200, (("A", "b"),))
    assert await read(answer) == whole
    assert answer.is_spooled is is_spooled
    answer.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_reader_in_the_middle_follows_into_the_file(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=1 << 20, memory_bytes_max=10)
    answer.begin(200, ())
    chunks = answer.chunks()
    answer.write(b"12345")
    assert await anext(chunks) == b"12345"
    answer.write(b"6789abcdef")
    assert await anext(chunks) == b"6789abcdef"
    answer.finish()
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)
    answer.close()


async def test_a_failure_comes_after_what_was_written(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=100)
    answer.begin(200, ())
    answer.write(b"abc")
    answer.fail(EngineDisconnected())
    answer.finish()
    chunks = answer.chunks()
    assert await anext(chunks) == b"abc"
    with pytest.raises(EngineDisconnected):
        await anext(chunks)
    assert not answer.is_finished


async def test_a_failure_before_the_head(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=100)
    waiting = asyncio.create_task(answer.wait_head())
    await asyncio.sleep(0)
    answer.fail(EngineDisconnected())
    with pytest.raises(EngineDisconnected):
        await waiting


async def test_the_limit(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=4)
    answer.begin(200, ())
    answer.write(b"1234")
    with pytest.raises(ResponseTooLarge):
        answer.write(b"5")
    with pytest.raises(ResponseTooLarge):
        await read(answer)


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path / "gone", bytes_max=1000, memory_bytes_max=4)
    answer.begin(200, ())
    with pytest.raises(StoreError):
        answer.write(b"12345")
    with pytest.raises(StoreError):
        await read(answer)


async def test_closing_wakes_readers_and_forgets(tmp_path: Path) -> None:
    answer = HeldAnswer(tmp_path, bytes_max=1000)
    answer.begin(200, ())
    reading = asyncio.create_task(read(answer))
    await asyncio.sleep(0)
    answer.close()
    with pytest.raises(AnswerGone):
        await reading
    with pytest.raises(AnswerGone):
        await answer.wait_head()
