"""What a hand-off promises, one story at a time and by seed, in virtual time: no order to unload meets a job,
no job meets an order that is still under way, and nothing that goes wrong in between keeps a gpu for ever."""

import asyncio
import contextlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from gpulane.core.model import GpuId, JobState, ModelKey, Service
from gpulane.dispatcher.gateway import Gateway
from gpulane.errors import GpulaneError
from gpulane.testing import virtual_time
from tests.virtual.test_dispatcher import A1111, COMFYUI, in_state, play, ready, submitted
from tests.virtual.test_interleavings import OUR_FAULTS
from tests.virtual.world import World, request, world

GPU = GpuId("box/gpu0")
QUICK = "handoff: {unload_seconds: 2, acknowledge_seconds: 3}\n"
SKIP = "handoff: {unload_seconds: 2, acknowledge_seconds: 3, when_leaking: skip}\n"
IMPATIENT = "health: {hung_seconds_min: 10, hung_factor: 1, hung_interrupt_seconds: 5}\n"
SEEDS = 25


async def claims(w: World) -> int:
    return sum(1 for name in w.store.asked if name == "claim")


def test_no_job_begins_beside_an_engine_that_refuses_to_unload_since_it_works(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway(QUICK) as gateway:
            await ready(gateway)
            await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
            w.engines[A1111].unload_fault = "busy"
            job = await submitted(w, gateway)
            await asyncio.sleep(20)
            assert await w.state(job) is JobState.QUEUED
            assert await claims(w) < 14, "it spins"
            w.engines[A1111].unload_fault = ""
            await in_state(w, job, JobState.SUCCEEDED)

    play(tmp_path, story)


def test_a_leaking_engine_that_lets_go_later_gives_its_gpu_back(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway(SKIP) as gateway:
            await ready(gateway)
            await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
            w.engines[A1111].unload_fault = "fails"
            job = await submitted(w, gateway)
            await asyncio.sleep(60)
            assert await w.state(job) is JobState.QUEUED
            assert await claims(w) < 6, "it spins"
            w.engines[A1111].unload_fault = ""
            await in_state(w, job, JobState.SUCCEEDED)

    play(tmp_path, story)


def test_a_job_waits_for_an_unload_of_its_engine_that_nobody_acknowledged(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway(QUICK) as gateway:
            await ready(gateway)
            await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
            w.engines[A1111].unload_fault = "hangs"
            await in_state(w, await submitted(w, gateway), JobState.SUCCEEDED)
            late = await submitted(w, gateway, Service.A1111)
            await asyncio.sleep(10)
            assert await w.state(late) is not JobState.SUCCEEDED
            w.engines[A1111].unload_fault = ""
            await in_state(w, late, JobState.SUCCEEDED)

    play(tmp_path, story)


def test_a_cancel_during_a_handoff_ends_it_soon_and_a_lease_outlives_it(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        slow = "handoff: {unload_seconds: 2, acknowledge_seconds: 60}\n"
        async with w.gateway(slow) as gateway:
            await ready(gateway)
            await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
            w.engines[A1111].unload_fault = "hangs"
            job = await submitted(w, gateway)
            await asyncio.sleep(50)
            assert await w.state(job) is JobState.QUEUED
            assert await claims(w) == 2, "its lease ran out"
            await gateway.cancel(job)
            await in_state(w, job, JobState.CANCELLED, seconds=1)
            async with asyncio.timeout(15):  # an order that was sent is waited for, nothing after it
                while gateway.gpus()[0].state != "idle":
                    await asyncio.sleep(0.1)

    play(tmp_path, story)


@pytest.mark.parametrize("stops", [True, False])
def test_who_cancels_a_job_that_hangs_has_it_cancelled(tmp_path: Path, *, stops: bool) -> None:
    async def story(w: World) -> None:
        async with w.gateway(IMPATIENT) as gateway:
            await ready(gateway)
            engine = w.engines[COMFYUI]
            engine.hold_seconds, engine.stop_seconds = 100.0, 12.0 if stops else 500.0
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
            await asyncio.sleep(8)
            await gateway.cancel(job)
            await in_state(w, job, JobState.CANCELLED, seconds=60)
            after = await submitted(w, gateway)
            engine.hold_seconds = 0.1
            await in_state(w, after, JobState.SUCCEEDED, seconds=600)

    play(tmp_path, story)


def test_a_gpu_without_jobs_is_unloaded_once_and_never_under_one(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway("handoff: {idle_unload_seconds: 4, acknowledge_seconds: 3}\n") as gateway:
            await ready(gateway)
            for _ in range(12):
                await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
                await asyncio.sleep(3.5 + w.chance.random() * 3)
            w.engines[A1111].unload_fault = "fails"
            await in_state(w, await submitted(w, gateway, Service.A1111), JobState.SUCCEEDED)
            before = w.engines[A1111].unloads
            await asyncio.sleep(200)
            assert w.engines[A1111].unloads == before + 1

    play(tmp_path, story)


def test_what_cannot_be_measured_after_a_job_harms_nobody(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            new = w.new(Service.COMFYUI)
            new = replace(new, job=replace(new.job, model=ModelKey("sd")))
            await gateway.submit(new, request())
            await in_state(w, new.job.id, JobState.RUNNING)
            w.engines[COMFYUI].is_vram_broken = True
            await in_state(w, new.job.id, JobState.SUCCEEDED, seconds=20)

    play(tmp_path, story)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_unloads_do_no_job_meets_one(tmp_path: Path, seed: int) -> None:
    with structlog.testing.capture_logs() as logs:
        virtual_time.run(shared_card(tmp_path, seed), seed=seed, seconds_max=100_000)
    broken = [entry for entry in logs if entry["event"] in OUR_FAULTS]
    assert not broken, broken


async def shared_card(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    mode = chance.choice(["run", "skip"])
    idle = chance.choice(["", ", idle_unload_seconds: 2"])
    more = f"handoff: {{unload_seconds: 2, acknowledge_seconds: 2, when_leaking: {mode}{idle}}}\n{IMPATIENT}"
    async with world(folder, seed=seed) as w:
        for life in range(2):
            # What an earlier life had sent and not seen acknowledged is over: nobody remembers it.
            await asyncio.sleep(6)
            async with w.gateway(more) as gateway:
                await ready(gateway)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(use(w, gateway, chance))
                    tasks.create_task(disturb(w, gateway, chance))
                if life:
                    await calm(w, gateway)
        assert not w.overlaps(), w.overlaps()
        assert not w.unloaded_at_work(), w.unloaded_at_work()


async def use(w: World, gateway: Gateway, chance: random.Random) -> None:
    for _ in range(14):
        await asyncio.sleep(chance.random() * 3)
        with contextlib.suppress(GpulaneError):
            job = await submitted(w, gateway, chance.choice([Service.COMFYUI, Service.A1111]))
            if chance.random() < 0.25:
                await asyncio.sleep(chance.random() * 3)
                await gateway.cancel(job)


async def disturb(w: World, gateway: Gateway, chance: random.Random) -> None:
    for _ in range(12):
        await asyncio.sleep(chance.random() * 3)
        engine = chance.choice(list(w.engines.values()))
        match chance.randrange(6):
            case 0:
                await engine.die()
                await asyncio.sleep(chance.random() * 3)
                engine.is_up = True
            case 1:
                engine.accept(f"stranger {chance.random()}", chance.random() * 4)
            case 2:
                await gateway.drain(GPU, True)
                await asyncio.sleep(chance.random() * 3)
                await gateway.drain(GPU, False)
            case 3:
                engine.hold_seconds = chance.choice([None, 40.0])
            case _:
                engine.unload_fault = chance.choice(["", "late", "lies", "hangs", "fails", "busy"])


async def calm(w: World, gateway: Gateway) -> None:
    for engine in w.engines.values():
        engine.unload_fault, engine.is_up, engine.hold_seconds = "", True, None
    await gateway.drain(GPU, False)
    await w.all_ended()
    for service in (Service.COMFYUI, Service.A1111):
        new = w.new(service)
        await gateway.submit(new, request())
        await in_state(w, new.job.id, JobState.SUCCEEDED, seconds=200)
