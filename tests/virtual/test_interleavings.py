"""The dispatcher under everything at once, in virtual time, by seed: no two jobs on a card, every job ends,
nothing leaks.

The oracle is what the cards saw. A seed that fails is a case to keep.
"""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest
import structlog

from gpulane.core.model import JobId, JobState, Service
from gpulane.dispatcher.gateway import Gateway
from gpulane.errors import GpulaneError, StoreError
from gpulane.testing import virtual_time
from tests.virtual.world import World, now, request, the_loop, world

SEEDS = 50
JOBS = 14
CALLS = 8
LIVES = 3
OUR_FAULTS = {
    "attempt_broke",
    "beat_broke",
    "decision_broke",
    "end_left_to_its_lease",
    "end_not_recorded",
    "event_not_followed",
    "event_not_recorded",
    "fact_not_recorded",
    "listener_broke",
    "look_broke",
    "not_learned",
    "recovery_broke",
    "task_broke",
}
"""Logged where a fault of the dispatcher itself was caught; only the engine clients are made to break
here."""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_overlaps_nothing_is_lost_nothing_leaks(tmp_path: Path, seed: int) -> None:
    with structlog.testing.capture_logs() as logs:
        virtual_time.run(story(tmp_path, seed), seed=seed, seconds_max=100_000)
    broken = [entry for entry in logs if entry["event"] in OUR_FAULTS]
    assert not broken, broken


async def story(folder: Path, seed: int) -> None:
    async with world(folder, seed=seed, gpus=2) as w:
        chance = random.Random(seed)
        w.trouble.raises, w.trouble.breaks, w.trouble.fails, w.trouble.loses = 0.06, 0.08, 0.08, 0.05
        w.trouble.store, w.trouble.records = chance.choice([0.0, 0.1]), chance.choice([0.0, 0.1])
        accepted: list[JobId] = []
        for life in range(LIVES):
            last = life == LIVES - 1
            while not await one_life(w, chance, accepted, is_last=last) and last:
                await asyncio.sleep(1)
        await check_after(w, accepted)


async def one_life(w: World, chance: random.Random, accepted: list[JobId], *, is_last: bool) -> bool:
    """Returns whether the gateway started at all: a store that fails just then keeps it from that."""
    has_started = False
    try:
        async with w.gateway() as gateway:
            has_started = True
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(submit(w, gateway, chance, accepted))
                calls = [tasks.create_task(call(w, gateway, chance)) for _ in range(CALLS)]
                tasks.create_task(trouble(w, gateway, chance))
                if not is_last:
                    await asyncio.sleep(chance.random() * 15)
                    for task in calls:
                        task.cancel()
            if is_last:
                await calm(w, gateway)
    except StoreError:
        assert not has_started
    return has_started


async def submit(w: World, gateway: Gateway, chance: random.Random, accepted: list[JobId]) -> None:
    await asyncio.sleep(1)
    for _ in range(JOBS):
        await asyncio.sleep(chance.random())
        new = w.new(chance.choice([Service.COMFYUI, Service.A1111]), account=chance.choice(["ann", "bob"]))
        try:
            await gateway.submit(new, request())
            accepted.append(new.job.id)
        except GpulaneError:
            continue
        if chance.random() < 0.3:
            with contextlib.suppress(GpulaneError):
                await asyncio.sleep(chance.random() * 2)
                await gateway.cancel(chance.choice(accepted))


async def call(w: World, gateway: Gateway, chance: random.Random) -> None:
    """A client that waits, that leaves, or that leaves and asks again."""
    await asyncio.sleep(1 + chance.random() * 10)
    digest = str(chance.randrange(4))
    for _ in range(2):
        try:
            held = await gateway.hold(w.new(Service.A1111, digest=digest), request())
        except GpulaneError:
            return
        patience = None if chance.random() < 0.5 else chance.random() * 6
        try:
            async with asyncio.timeout(patience):
                await held.answer.wait_head()
                async for _chunk in held.answer.chunks():
                    pass
        except TimeoutError:
            gateway.leave(held.job)
            await asyncio.sleep(chance.random() * 8)
            continue
        except GpulaneError:
            pass
        gateway.answered(held.job)
        return


async def trouble(w: World, gateway: Gateway, chance: random.Random) -> None:
    for _ in range(8):
        await asyncio.sleep(chance.random() * 3)
        engine = chance.choice(list(w.engines.values()))
        match chance.randrange(6):
            case 0:
                await engine.die()
                await asyncio.sleep(chance.random() * 4)
                engine.is_up = True
            case 1:
                engine.is_silent = True
                await asyncio.sleep(chance.random() * 8)
                engine.is_silent = False
            case 2:
                engine.accept(f"stranger {chance.random()}", chance.random() * 4)
            case 3:
                gpu = chance.choice(list(w.cards))
                with contextlib.suppress(GpulaneError):
                    await gateway.drain(gpu, True)
                    await asyncio.sleep(chance.random() * 3)
                    await gateway.drain(gpu, False)
            case 4:
                the_loop().jump(chance.choice([5.0, 40.0, 400.0]))
            case _:
                engine.read_seconds = chance.random() * 0.5


async def calm(w: World, gateway: Gateway) -> None:
    """Once nothing goes wrong any more, everything ends, and every gpu is free."""
    for name in ("raises", "breaks", "fails", "loses", "store", "records"):
        setattr(w.trouble, name, 0.0)
    for engine in w.engines.values():
        engine.is_up, engine.is_silent, engine.read_seconds = True, False, 0.0
    for gpu in w.cards:
        await gateway.drain(gpu, False)
    await w.all_ended()
    async with asyncio.timeout(300):
        while not all(gpu.state == "idle" for gpu in gateway.gpus()):
            await asyncio.sleep(1)
    async with asyncio.timeout(300):
        while w.records.records:
            await asyncio.sleep(1)
    gateway._book.check()
    assert gateway._loop._missed is None
    assert not gateway._book.active
    for service in (Service.COMFYUI, Service.A1111):  # every engine is of use again
        new = w.new(service)
        await gateway.submit(new, request())
        began = now()
        while await w.state(new.job.id) is not JobState.SUCCEEDED:
            await asyncio.sleep(0.1)
            assert now() - began < 60, f"{service} runs nothing any more"
    await asyncio.sleep(120)
    assert len(gateway._held) == 0, "a call is kept for ever"


async def check_after(w: World, accepted: list[JobId]) -> None:
    assert not w.overlaps(), w.overlaps()
    records = {record.job.id: record for record in await w.records_of_jobs()}
    assert set(accepted) <= set(records)
    computed = w.computed()
    for job, record in records.items():
        assert computed.count(job) <= record.attempts_counted, (job, record)
        if record.state is JobState.SUCCEEDED:
            assert job in computed, record
