"""GET /ws: each client hears of its own jobs, in ComfyUI's words, and a slow one delays nobody."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import uuid
from pathlib import Path

import aiohttp
import msgspec
import pytest

from gpulane.core.model import Account, JobId, JobState, Service
from gpulane.engine.progress import Progress
from gpulane.store.base import NewJob, QueueLimits
from tests.integration.web.comfyui.gateway import (
    ANN,
    BOB,
    Ear,
    Gateway,
    ear,
    gateway,
    result_of,
    submit,
)

pytestmark = pytest.mark.anyio


async def run(door: Gateway, job: JobId, *, steps: int = 2) -> None:
    """Say what an engine says during a run, up to before its end."""
    await door.jobs.start(job)
    door.jobs.say(job, "execution_start", timestamp=1)
    door.jobs.say(job, "execution_cached", nodes=[], timestamp=1)
    door.jobs.say(job, "executing", node="1", display_node="1")
    for step in range(1, steps + 1):
        door.jobs.say(job, "progress_state", nodes={"1": {"value": step, "prompt_id": job}})
        door.jobs.show(job)
        door.jobs.say(job, "progress", value=step, max=steps, node="1")


def say_success(door: Gateway, job: JobId) -> None:
    door.jobs.say(job, "execution_success", timestamp=2)
    door.jobs.say(job, "executing", node=None)


RUN = ["execution_start", "execution_cached", "executing"]
STEP = ["progress_state", "frame 4", "progress"]
END = ["execution_success", "run over"]


async def test_whole_run_is_heard_in_order(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        assert heard.all("status") == [{"status": {"exec_info": {"queue_remaining": 0}}, "sid": "c1"}]
        assert heard.all("feature_flags")[0]["supports_preview_metadata"] is True
        job = JobId(await submit(ann, client_id="c1"))
        await run(door, job)
        say_success(door, job)
        await heard.until_kind("progress", 2)
        assert heard.kinds == ["feature_flags", *RUN, *STEP, *STEP]  # the end is not recorded yet
        await door.jobs.finish(job, result=result_of(job))
        await heard.until_kind("run over")
        assert heard.kinds[-2:] == END
        assert heard.all("executing")[-1:] == [{"node": "1", "display_node": "1", "prompt_id": job}]
        async with ann.get(f"/history/{job}") as answer:
            assert job in await answer.json()
        await heard.until(lambda e: _remaining(e) == 0)


async def test_client_sees_its_own_prompt_id(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        await submit(ann, client_id="c1", prompt_id="mine")
        record = await door.jobs.record_of_client(*_named("mine"))
        assert record is not None
        await run(door, record.job.id)
        say_success(door, record.job.id)
        await door.jobs.finish(record.job.id, result=result_of(record.job.id))
        await heard.until_kind("run over")
        assert not any(record.job.id in str(message) for message in heard.heard)
        assert {data["prompt_id"] for data in heard.all("progress")} == {"mine"}


async def test_plain_previews_for_who_did_not_ask_for_metadata(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path) as door,
        door.person(ANN) as ann,
        ear(ann, metadata=False) as plain,
        ear(ann) as rich,
    ):
        job = JobId(await submit(ann, client_id="c1"))
        await run(door, job, steps=1)
        await plain.until_kind("frame 1")
        await rich.until_kind("frame 4")
        frame = next(m for m in plain.heard if isinstance(m, bytes))
        assert frame == b"\0\0\0\1\0\0\0\1\xff\xd8\xff\xe0picture"
        assert "frame 1" not in rich.kinds


async def test_other_accounts_and_other_clients_hear_nothing(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path) as door,
        door.person(ANN) as ann,
        door.person(BOB) as bob,
        ear(ann, "c1") as mine,
        ear(ann, "c2") as other,
        ear(bob, "c1") as foreign,
    ):
        job = JobId(await submit(ann, client_id="c1"))
        await run(door, job)
        say_success(door, job)
        await door.jobs.finish(job, result=result_of(job))
        await mine.until_kind("run over")
        await other.until(lambda e: len(e.all("status")) >= 2)
        assert other.kinds == foreign.kinds == ["feature_flags"]
        assert len(foreign.all("status")) == 1  # nor how much others have waiting


async def test_two_sockets_of_one_client_both_hear_everything(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as first:
        async with ear(ann) as second:
            job = JobId(await submit(ann, client_id="c1"))
            await run(door, job)
            await first.until_kind("progress", 2)
            await second.until_kind("progress", 2)
        say_success(door, job)
        await door.jobs.finish(job, result=result_of(job))
        await first.until_kind("run over")  # the second one's leaving takes nothing away


async def test_reconnect_in_the_middle_is_told_the_state(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        async with ear(ann) as first:
            job = JobId(await submit(ann, client_id="c1"))
            await run(door, job, steps=3)
            await first.until_kind("progress", 3)
        async with ear(ann) as again:
            assert again.all("status")[0]["status"] == {"exec_info": {"queue_remaining": 1}}
            assert again.kinds[:3] == ["executing", "progress_state", "progress"]
            assert again.all("progress")[0]["value"] == 3
            say_success(door, job)
            await door.jobs.finish(job, result=result_of(job))
            await again.until_kind("run over")
        async with ear(ann) as after:
            assert after.kinds == ["feature_flags"]


async def test_restarted_gateway_knows_whose_jobs_run(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        job = JobId(await submit(ann, client_id="c1", prompt_id="mine"))
        await run(door, await _id_of(door, "mine"))
        jobs = door.jobs
    assert job == "mine"
    async with gateway(tmp_path, jobs=jobs) as door, door.person(ANN) as ann:
        ours = await _id_of(door, "mine")
        door.jobs.say(ours, "executing", node="2", display_node="2")
        async with ear(ann) as heard:
            assert heard.all("status")[0]["status"] == {"exec_info": {"queue_remaining": 1}}
            assert heard.all("executing") == [{"node": "2", "display_node": "2", "prompt_id": "mine"}]
            say_success(door, ours)
            await door.jobs.finish(ours, result=result_of(ours))
            await heard.until_kind("run over")


async def test_sid_is_minted_for_a_new_page(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann, None) as heard:
        sid = heard.all("status")[0]["sid"]
        assert isinstance(sid, str)
        assert len(sid) == 32
        job = JobId(await submit(ann, client_id=sid))
        await run(door, job)
        await heard.until_kind("progress", 2)


@pytest.mark.parametrize("phase", ["waiting", "claimed", "running"])
async def test_cancelled_job_ends_for_its_client(tmp_path: Path, phase: str) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        job = JobId(await submit(ann, client_id="c1"))
        if phase == "claimed":
            await door.jobs.claim(job)
        if phase == "running":
            await run(door, job)
        async with ann.post(f"/api/jobs/{job}/cancel") as answer:
            assert await answer.json() == {"cancelled": True}
        if phase == "running":
            assert door.jobs.cancels[job].is_set()
            door.jobs.say(job, "execution_success", timestamp=2)  # it was faster; the cancel wins
            await door.jobs.finish(job, result=result_of(job))
        await heard.until_kind("run over")
        assert heard.kinds[-2:] == ["execution_interrupted", "run over"]
        assert heard.all("execution_interrupted")[0]["prompt_id"] == job
        await heard.until(lambda e: _remaining(e) == 0)


async def test_cancelling_a_waiting_job_leaves_the_running_one_on_the_page(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        running, waiting = JobId(await submit(ann, client_id="c1")), await submit(ann, client_id="c1")
        await run(door, running)
        async with ann.post("/queue", json={"delete": [waiting]}):
            pass
        await heard.until_kind("progress", 3)
        shown = [
            "execution_interrupted",
            "run over",
            "execution_start",
            "executing",
            "progress_state",
            "progress",
        ]
        assert heard.kinds[-6:] == shown
        assert heard.all("execution_start")[-1]["prompt_id"] == running


async def test_failed_job_tells_why_and_a_retried_one_does_not(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        job = JobId(await submit(ann, client_id="c1"))
        await run(door, job)
        door.jobs.say(job, "execution_error", exception_message="lost", node_id="1")
        door.jobs.say(job, "executing", node=None)
        await door.jobs.fail_attempt(job)
        await run(door, job)
        await heard.until_kind("execution_start", 2)
        assert "execution_error" not in heard.kinds
        await door.jobs.finish(job, JobState.FAILED)
        await heard.until_kind("run over")
        assert heard.all("execution_error")[0]["exception_message"] == "CUDA out of memory"


async def test_status_is_throttled_and_the_last_one_is_right(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(submit(ann) for _ in range(50)))
        await heard.until(lambda e: _remaining(e) == 50)
        seconds = loop.time() - began
        assert len(heard.all("status")) <= 3 + seconds / 0.2


async def test_stalled_reader_delays_nobody_and_is_given_up(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as healthy:
        with await _stalled(door) as stalled:
            job = JobId(await submit(ann, client_id="c1"))
            await run(door, job, steps=0)
            await healthy.until_kind("executing")
            loop = asyncio.get_running_loop()
            slowest = 0.0
            for step in range(1, 21):
                began = loop.time()
                door.jobs.show(job, b"\xff\xd8" + bytes(500_000))
                for part in range(50):
                    door.jobs.say(job, "executed", node=str(part), output={"text": ["x" * 1000]})
                door.jobs.say(job, "progress", value=step, max=20, node="1")
                await healthy.until_kind("progress", step)
                slowest = max(slowest, loop.time() - began)
            assert slowest < 5.0
            # What must not be missed is more than its buffer now: it was cut off.
            for round_of_many in range(1, 13):
                for part in range(1000):
                    door.jobs.say(job, "executed", node=str(part), output={"text": ["x" * 1000]})
                await healthy.until_kind("executed", 1000 + 1000 * round_of_many)
            await asyncio.wait_for(_until_reset(stalled), 10.0)
        say_success(door, job)
        await door.jobs.finish(job, result=result_of(job))
        await healthy.until_kind("run over")


async def test_garbage_and_large_frames_harm_nobody(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann, metadata=False) as heard:
        await heard.socket.send_str("garbage {")
        await heard.socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        await heard.socket.send_bytes(b"\0" * 100)
        job = JobId(await submit(ann, client_id="c1"))
        await run(door, job, steps=1)
        await heard.until_kind("frame 1")  # only the first message may negotiate
        async with ear(ann, "c2", metadata=False) as second:
            with contextlib.suppress(ConnectionError):
                await second.socket.send_str(" " * (4 * 1024 * 1024 + 1))
            await second.until(lambda e: e.is_closed)
        say_success(door, job)
        await door.jobs.finish(job, result=result_of(job))
        await heard.until_kind("run over")


async def test_what_is_no_message_of_a_run_is_not_passed_on(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        job = JobId(await submit(ann, client_id="c1"))
        await door.jobs.start(job)
        door.jobs.hub.publish(Progress(job=job, message=b"no json"))
        door.jobs.hub.publish(Progress(job=job, message=msgspec.json.encode({"type": "status", "data": {}})))
        door.jobs.hub.publish(Progress(job=job, binary=b"\0\0"))
        door.jobs.say(job, "executing", node="1", display_node="1")
        await heard.until_kind("executing")
        assert heard.kinds == ["feature_flags", "frame 0", "executing"]


def _remaining(heard: Ear) -> object:
    status = heard.all("status")[-1]["status"]
    assert isinstance(status, dict)
    return msgspec.convert(status, dict[str, dict[str, int]])["exec_info"]["queue_remaining"]


def _named(client_job_id: str) -> tuple[Account, Service, str]:
    return Account("ann"), Service.COMFYUI, client_job_id


async def _id_of(door: Gateway, client_job_id: str) -> JobId:
    record = await door.jobs.record_of_client(*_named(client_job_id))
    assert record is not None
    return record.job.id


async def _stalled(door: Gateway) -> socket.socket:
    """Open a socket under the same client id that never reads."""
    host, _, port = door.url.removeprefix("http://").partition(":")
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stalled, (host, int(port)))
    head = (
        f"GET /ws?clientId=c1 HTTP/1.1\r\nHost: {host}:{port}\r\nX-Api-Key: {ANN}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await loop.sock_sendall(stalled, head.encode())
    answer = await loop.sock_recv(stalled, 1024)
    assert b" 101 " in answer
    return stalled


async def _until_reset(stalled: socket.socket) -> None:
    """Read what had come, up to the cut."""
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(stalled, 1 << 20):
            pass
    except ConnectionError:
        pass


async def test_clearing_a_long_queue_cuts_nobody_off(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        running = JobId(await submit(ann, client_id="c1"))
        await run(door, running)
        for number in range(1200):
            record = await door.jobs.record(running)
            assert record is not None
            job = dataclasses.replace(record.job, id=JobId(str(uuid.UUID(int=number, version=4))))
            await door.jobs.store.enqueue(NewJob(job=job, meta=record.meta), QueueLimits())
        async with ann.get("/queue") as answer:
            assert len((await answer.json())["queue_pending"]) == 1200
        async with ann.post("/queue", json={"clear": True}) as answer:
            assert answer.status == 200
        await heard.until(lambda e: _remaining(e) == 1)
        await heard.until_kind("execution_interrupted", 1200)
        assert not heard.is_closed
        say_success(door, running)
        await door.jobs.finish(running, result=result_of(running))
        await heard.until_kind("execution_success")


async def test_stopping_says_goodbye_and_does_not_wait_for_a_stalled_client(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        with await _stalled(door):
            job = JobId(await submit(ann, client_id="c1"))
            await run(door, job, steps=0)
            for step in range(30):
                door.jobs.show(job, bytes(500_000))
                door.jobs.say(job, "progress", value=step, max=30, node="1")
                await heard.until_kind("progress", step + 1)
            async with asyncio.timeout(8.0):
                await door.front.close()
        await heard.until(lambda e: e.is_closed)
        assert heard.socket.close_code == aiohttp.WSCloseCode.GOING_AWAY
