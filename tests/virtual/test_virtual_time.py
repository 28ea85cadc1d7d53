"""The loop itself: time jumps, order is by seed, a deadlock is told."""

import asyncio

import pytest

from gpulane.testing import virtual_time


def test_a_day_passes_at_once_and_in_order() -> None:
    heard: list[tuple[str, float]] = []

    async def wake(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        heard.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(wake("late", 80_000.0))
            tasks.create_task(wake("early", 1.5))

    virtual_time.run(main())
    assert heard == [("early", 1.5), ("late", 80_000.0)]


def test_timeouts_queues_and_events_work() -> None:
    async def main() -> int:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await queue.get()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(queue.put(3))
            got = tasks.create_task(queue.get())
        return got.result()

    assert virtual_time.run(main()) == 3


def order(seed: int | None) -> list[int]:
    found: list[int] = []

    async def note(number: int) -> None:
        await asyncio.sleep(0)
        found.append(number)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(note(number))

    virtual_time.run(main(), seed=seed)
    return found


def test_a_seed_shuffles_what_is_ready_and_repeats_exactly() -> None:
    assert order(None) == list(range(8))
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(10)}) > 5


def test_a_check_then_act_race_is_found() -> None:
    async def race() -> int:
        places, taken = 1, 0

        async def take() -> None:
            nonlocal taken, places
            await asyncio.sleep(0)
            if places:
                await asyncio.sleep(0)
                places -= 1
                taken += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(take())
        return taken

    assert max(virtual_time.run(race(), seed=seed) for seed in range(50)) == 2


def test_a_deadlock_is_told() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises((virtual_time.Deadlock, TimeoutError)):
        virtual_time.run(main(), seconds_max=10)
