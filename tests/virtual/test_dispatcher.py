"""What the dispatcher promises, one story at a time, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpulane.core.events import JobSubmitted, StoreEvent
from gpulane.core.model import EngineUrl, GpuId, JobId, JobState, Service
from gpulane.dispatcher.gateway import Gateway
from gpulane.errors import GpulaneError, Unavailable
from gpulane.testing import virtual_time
from gpulane.views import HeldCall
from tests.virtual.world import World, request, the_loop, world

COMFYUI, A1111 = EngineUrl("http://comfyui0"), EngineUrl("http://a11110")
Story = Callable[[World], Coroutine[Any, Any, None]]


def play(folder: Path, story: Story, *, gpus: int = 1) -> None:
    async def main() -> None:
        async with world(folder, gpus=gpus) as w:
            await story(w)
            assert not w.overlaps(), w.overlaps()

    virtual_time.run(main(), seconds_max=10_000)


async def submitted(w: World, gateway: Gateway, service: Service = Service.COMFYUI) -> JobId:
    new = w.new(service)
    await gateway.submit(new, request())
    return new.job.id


async def in_state(w: World, job: JobId, *states: JobState, seconds: float = 120) -> None:
    async with asyncio.timeout(seconds):
        while await w.state(job) not in states:
            await asyncio.sleep(0.02)


async def ready(gateway: Gateway, count: int = 2) -> None:
    async with asyncio.timeout(60):
        while sum(view.state == "ready" for view in gateway.engines()) < count:
            await asyncio.sleep(0.05)


async def head(call: HeldCall, seconds: float = 60) -> int:
    async with asyncio.timeout(seconds):
        return (await call.answer.wait_head())[0]


# --- calls


def test_who_asks_again_after_a_call_was_given_up_gets_a_new_one(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            await gateway.drain(GpuId("box/gpu0"), True)
            first = await gateway.hold(w.new(Service.A1111, digest="same"), request())
            gateway.leave(first.job)
            await in_state(w, first.job, JobState.CANCELLED)
            await gateway.drain(GpuId("box/gpu0"), False)
            again = await gateway.hold(w.new(Service.A1111, digest="same"), request())
            assert again.job != first.job
            assert await head(again) == 200

    play(tmp_path, story)


def test_a_call_left_just_before_it_starts_is_finished_for_whoever_asks_again(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            w.engines[A1111].is_silent = True  # it hangs in the claim, while the engine is asked
            first = await gateway.hold(w.new(Service.A1111, digest="same"), request())
            await asyncio.sleep(0.5)
            gateway.leave(first.job)
            w.engines[A1111].is_silent = False
            await in_state(w, first.job, JobState.SUCCEEDED, JobState.CANCELLED)
            if await w.state(first.job) is JobState.SUCCEEDED:
                again = await gateway.hold(w.new(Service.A1111, digest="same"), request())
                assert again.job == first.job
                assert await head(again) == 200

    play(tmp_path, story)


def test_an_answer_read_before_its_end_is_recorded_is_not_kept(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            for _ in range(5):
                call = await gateway.hold(w.new(Service.A1111), request())
                assert await head(call) == 200
                gateway.answered(call.job)
            await asyncio.sleep(2)
            assert len(gateway._held) == 0

    play(tmp_path, story)


def test_a_call_known_by_its_clients_name_is_joined_and_hangs_nobody(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            calls = [replace(w.new(Service.A1111, digest="d"), client_job_id="task(1)") for _ in range(3)]
            first = await gateway.hold(calls[0], request())
            second = await gateway.hold(calls[1], request())
            assert second.job == first.job
            assert await head(first) == await head(second) == 200
            gateway.answered(first.job)
            gateway.answered(first.job)
            await in_state(w, first.job, JobState.SUCCEEDED)
            with pytest.raises(GpulaneError):
                await gateway.hold(calls[2], request())
            assert len(gateway._held) == 0

    play(tmp_path, story)


def test_a_quiet_end_refuses_who_waits_and_finishes_what_runs(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            runs = await gateway.hold(w.new(Service.A1111), request())
            await in_state(w, runs.job, JobState.RUNNING)
            waits = await gateway.hold(w.new(Service.A1111), request())
            stored = await submitted(w, gateway)
            ending = asyncio.create_task(gateway.quiet_end())
            with pytest.raises(Unavailable):
                await head(waits, seconds=0.5)
            await ending
            assert await head(runs) == 200
            assert await w.state(runs.job) is JobState.SUCCEEDED
            assert await w.state(stored) is JobState.QUEUED

    play(tmp_path, story)


def test_an_end_at_once_refuses_who_runs_too(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            call = await gateway.hold(w.new(Service.A1111), request())
            await in_state(w, call.job, JobState.RUNNING)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await gateway.quiet_end()
            with pytest.raises(Unavailable):
                await head(call, seconds=0.5)

    play(tmp_path, story)


# --- faults


def test_a_bug_in_an_attempt_is_a_failed_attempt(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            w.trouble.raises = 2.0
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.FAILED)
            w.trouble.raises = 0.0
            other = await submitted(w, gateway, Service.A1111)
            await in_state(w, other, JobState.SUCCEEDED)
            record = await gateway.record(job)
            assert record is not None
            assert record.attempts_counted == record.job.max_attempts

    play(tmp_path, story)


def test_a_body_that_is_gone_ends_the_job_and_says_so(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await gateway.drain(GpuId("box/gpu0"), True)
            gone, garbled = await submitted(w, gateway), await submitted(w, gateway)
        del w.store._bodies[gone]
        w.store._bodies[garbled] = b"garbled"
        async with w.gateway() as gateway:
            await gateway.drain(GpuId("box/gpu0"), False)
            for job in (gone, garbled):
                await in_state(w, job, JobState.FAILED)
                record = await gateway.record(job)
                assert record is not None
                assert record.failure is not None
                assert record.failure.code == "body_lost"
        assert not w.computed()

    play(tmp_path, story)


def test_a_listener_that_breaks_disturbs_nobody(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)

            def broken(events: tuple[StoreEvent, ...]) -> None:
                raise RuntimeError(events)

            gateway.listen(broken)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.SUCCEEDED)

    play(tmp_path, story)


def test_a_missed_event_is_mended_from_the_store(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            hear = gateway._hear

            def forgetful(events: tuple[StoreEvent, ...]) -> None:
                if not any(isinstance(event, JobSubmitted) for event in events):
                    hear(events)

            w.store.listen(forgetful)
            missed = await submitted(w, gateway)
            w.store.listen(hear)
            heard = await submitted(w, gateway)
            for job in (missed, heard):
                await in_state(w, job, JobState.SUCCEEDED)
            gateway._book.check()

    play(tmp_path, story)


def test_a_cancel_while_the_attempt_is_prepared_leaves_the_gpu_usable(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            for number in range(30):
                job = await submitted(w, gateway)
                await asyncio.sleep(number * 0.002)
                await gateway.cancel(job)
            last = await submitted(w, gateway)
            await in_state(w, last, JobState.SUCCEEDED, seconds=60)
            for owner in gateway._owners.values():
                assert owner.is_quiet

    play(tmp_path, story)


# --- the card


def test_a_silent_engine_of_the_same_card_may_be_busy(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            w.engines[A1111].is_silent = True
            job = await submitted(w, gateway)
            await asyncio.sleep(1.5)
            assert await w.state(job) is JobState.QUEUED
            await in_state(w, job, JobState.SUCCEEDED)  # once its watch has given it up
            assert next(v.state for v in gateway.engines() if v.url == A1111) == "lost"

    play(tmp_path, story)


def test_a_strangers_work_goes_with_its_engine(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            w.engines[COMFYUI].accept("stranger", 1_000)
            await asyncio.sleep(5)
            job = await submitted(w, gateway, Service.A1111)
            await asyncio.sleep(20)
            assert await w.state(job) is JobState.QUEUED
            await w.engines[COMFYUI].die()
            await in_state(w, job, JobState.SUCCEEDED, seconds=60)

    play(tmp_path, story)


# --- leases and restarts


def test_a_process_that_was_stopped_for_long_keeps_its_own_attempt(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
            for _ in range(3):
                the_loop().jump(400)
                w.engines[COMFYUI].accept("stranger", 30)
                await asyncio.sleep(10)
            await in_state(w, job, JobState.SUCCEEDED)
            record = await gateway.record(job)
            assert record is not None
            assert record.attempts_counted == 1
        assert w.computed().count(job) == 1

    play(tmp_path, story)


def test_a_restart_long_after_takes_its_job_over_before_anything_is_swept(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.engines[COMFYUI].hold_seconds = 2_000
        async with w.gateway() as gateway:
            await ready(gateway)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
            record = await gateway.record(job)
            assert record is not None
            assert record.token is not None
        await asyncio.sleep(100)
        await w.store.expire(job, record.token)
        await asyncio.sleep(1_000)
        async with w.gateway() as gateway:
            await in_state(w, job, JobState.SUCCEEDED, seconds=2_000)
            record = await gateway.record(job)
            assert record is not None
            assert record.attempts_counted == 1
        assert w.computed() == [job]

    play(tmp_path, story)


def test_a_gpu_under_another_name_still_has_its_job(tmp_path: Path) -> None:
    """A container's host name is another one at each start."""

    async def story(w: World) -> None:
        w.engines[COMFYUI].hold_seconds = 30
        async with w.gateway() as gateway:
            await ready(gateway)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
        w.gpus = (replace(w.gpus[0], id=GpuId("other/gpu0")),)
        async with w.gateway() as gateway:
            other = await submitted(w, gateway, Service.A1111)
            await in_state(w, job, JobState.SUCCEEDED)
            await in_state(w, other, JobState.SUCCEEDED)
            record = await gateway.record(job)
            assert record is not None
            assert record.attempts_counted == 1
        assert w.computed() == [job, other]

    play(tmp_path, story)


def test_an_engine_taken_out_of_the_settings_still_occupies_its_card(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.engines[COMFYUI].hold_seconds = 30
        async with w.gateway() as gateway:
            await ready(gateway)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
        w.engines[COMFYUI].is_silent = True  # it cannot be interrupted
        w.gpus = (replace(w.gpus[0], engines=w.gpus[0].engines[1:]),)
        async with w.gateway() as gateway:
            other = await submitted(w, gateway, Service.A1111)
            await asyncio.sleep(25)
            assert await w.state(other) is JobState.QUEUED
            w.engines[COMFYUI].is_silent = False
            await in_state(w, other, JobState.SUCCEEDED)

    play(tmp_path, story)


def test_a_cancel_while_its_job_is_recovered_holds(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.engines[COMFYUI].hold_seconds = 30
        async with w.gateway() as gateway:
            await ready(gateway)
            job = await submitted(w, gateway)
            await in_state(w, job, JobState.RUNNING)
        async with w.gateway() as gateway:
            await gateway.cancel(job)
            await in_state(w, job, JobState.CANCELLED, seconds=20)
        assert not w.computed()

    play(tmp_path, story)


def test_what_was_measured_is_known_after_a_restart(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        async with w.gateway() as gateway:
            await ready(gateway)
            await in_state(w, await submitted(w, gateway), JobState.SUCCEEDED)
            learned = gateway._book.learned.values()
            assert learned.services
        async with w.gateway() as gateway:
            assert gateway._book.learned.values() == learned
        w.records.values["measurements", "v1"] = b"garbled"
        async with w.gateway() as gateway:
            assert not gateway._book.learned.values().services

    play(tmp_path, story)
