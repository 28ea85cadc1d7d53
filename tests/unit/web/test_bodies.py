"""Big bodies are understood beside the event loop, small ones at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gpulane.web.bodies import BIG_BODY_BYTES, READERS_MAX, understood

pytestmark = pytest.mark.anyio

BOUND_SECONDS = 10.0
BIG = bytes(BIG_BODY_BYTES + 1)


async def test_a_small_body_is_understood_in_place() -> None:
    here = threading.get_ident()
    assert await understood(BIG[1:], threading.get_ident) == here


async def test_the_loop_goes_on_while_a_big_body_is_read() -> None:
    heard = threading.Event()
    asyncio.get_running_loop().call_soon(heard.set)
    assert await understood(BIG, lambda: heard.wait(BOUND_SECONDS)), "nothing else ran meanwhile"


async def test_what_reading_raises_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        await understood(BIG, lambda: 1 // 0)


async def test_a_client_that_leaves_frees_its_caller_at_once_and_later_the_thread() -> None:
    """Readers left behind end by themselves; those that had not begun never begin."""
    go, begun = threading.Event(), threading.Semaphore(0)
    count = 0

    def read() -> None:
        nonlocal count
        count += 1
        begun.release()
        go.wait(BOUND_SECONDS)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(understood(BIG, read)) for _ in range(READERS_MAX + 2)]
        for _ in range(READERS_MAX):
            assert await asyncio.to_thread(begun.acquire, timeout=BOUND_SECONDS)
        for task in tasks:
            task.cancel()
    go.set()
    assert await understood(BIG, lambda: "free") == "free"
    assert count == READERS_MAX
