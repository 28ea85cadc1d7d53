"""Held calls over the `http` front door: streaming, disconnects, failures, what is only relayed."""

from __future__ import annotations

import asyncio
import hashlib

import aiohttp
import pytest
from aiohttp import web

from gpulane.config import KeySettings, Settings
from gpulane.core.model import JobId
from gpulane.errors import EngineError
from gpulane.relay import HeldAnswer
from gpulane.web.patience import finished
from tests.integration.web.conftest import BOUND_SECONDS, Door, Doors, until

pytestmark = pytest.mark.anyio

CHAT = "/svc/llm/v1/chat/completions"
BODY = {"model": "tiny", "stream": True, "max_tokens": 5}


async def tell(request: web.Request) -> web.Response:
    return web.json_response(
        {
            "target": request.raw_path,
            "authorization": request.headers.get("Authorization"),
            "prefix": request.headers.get("X-Forwarded-Host"),
        }
    )


@pytest.fixture
async def llm(doors: Doors, door: Door) -> Door:
    await doors.engine(door, tell)
    return door


async def held(door: Door) -> tuple[JobId, HeldAnswer]:
    await until(lambda: bool(door.gateway.answers))
    return next(iter(door.gateway.answers.items()))


async def test_answer_streams_as_it_comes(llm: Door) -> None:
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(llm.client.post(CHAT, json=BODY))
        job, answer = await held(llm)
        record = await llm.gateway.record(job)
        assert record is not None and record.job.held and record.job.model == "tiny"
        assert llm.gateway.requests[job].target == "/v1/chat/completions"
        await llm.gateway.start(job)
        answer.begin(200, (("Content-Type", "text/event-stream"), ("Connection", "x-hop"), ("X-Hop", "1")))
    response = call.result()
    assert response.headers["X-Gpulane-Job"] == job
    assert response.headers["X-Gpulane-Gpu"] == "box/gpu0"
    assert response.headers["Content-Type"] == "text/event-stream"
    assert "X-Hop" not in response.headers
    answer.write(b"data: 1\n\n")
    assert await response.content.readany() == b"data: 1\n\n"
    answer.write(b"data: 2\n\n")
    answer.finish()
    assert await response.read() == b"data: 2\n\n"
    await until(lambda: llm.gateway.answered_jobs == [job])
    assert llm.gateway.left == []


async def test_client_that_leaves_is_noticed_at_once(llm: Door) -> None:
    call = asyncio.create_task(llm.client.post(CHAT, json=BODY))
    job, _ = await held(llm)
    begun = asyncio.get_running_loop().time()
    call.cancel()
    await until(lambda: llm.gateway.left == [job])
    assert asyncio.get_running_loop().time() - begun < 0.4
    assert llm.gateway.answered_jobs == []


async def test_client_that_leaves_in_the_middle_is_noticed(llm: Door) -> None:
    call = asyncio.create_task(llm.client.post(CHAT, json=BODY))
    job, answer = await held(llm)
    answer.begin(200, ())
    answer.write(b"half")
    response = await call
    assert await response.content.readany() == b"half"
    response.close()
    await until(lambda: llm.gateway.left == [job])


async def test_failures_come_in_openais_shape(llm: Door) -> None:
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(llm.client.post(CHAT, json=BODY))
        job, answer = await held(llm)
        answer.fail(EngineError("the engine died"))
    response = call.result()
    assert response.status == 502
    assert (await response.json())["error"]["message"] == "the engine died"
    assert llm.gateway.answered_jobs == [job]


async def test_failure_after_the_head_cuts_the_answer(llm: Door) -> None:
    call = asyncio.create_task(llm.client.post(CHAT, json=BODY))
    _, answer = await held(llm)
    answer.begin(200, ())
    answer.write(b"half")
    response = await call
    answer.fail(EngineError("the engine died"))
    with pytest.raises(aiohttp.ClientError):
        await response.read()


async def test_what_is_no_job_is_relayed(llm: Door) -> None:
    told = await llm.json("GET", "/svc/llm/v1/models?x=1", headers={"Authorization": "Bearer theirs"})
    assert told["target"] == "/v1/models?x=1"
    assert told["authorization"] == "Bearer theirs"
    assert await llm.gateway.waiting() == []
    refused = await llm.json("POST", "/svc/llm/v1//chat/completions", status=403, json=BODY)
    assert refused["error"]["code"] == "closed"
    refused = await llm.json("GET", "/svc/lln/", status=404)
    assert "'llm'" in refused["error"]["hint"]


async def test_our_keys_stay_here(doors: Doors) -> None:
    key = KeySettings(account="ann", sha256=hashlib.sha256(b"k").hexdigest())
    door = await doors.open(Settings(keys=(key,)))
    await doors.engine(door, tell)
    told = await door.json("GET", "/svc/llm/x", headers={"Authorization": "Bearer k"})
    assert told["authorization"] is None


async def test_dead_engine_is_a_502_in_shape(llm: Door, doors: Doors) -> None:
    await doors.runners.pop().cleanup()
    refused = await llm.json("GET", "/svc/llm/x", status=502)
    assert refused["error"]["type"] == "engine_unreachable"


async def test_what_was_begun_ends_although_the_caller_is_gone() -> None:
    began, goes_on = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def work() -> str:
        began.set()
        await goes_on.wait()
        ended.append("work")
        return "done"

    async def caller() -> None:
        try:
            await finished(work())
        except asyncio.CancelledError:
            ended.append("caller")
            raise

    task = asyncio.create_task(caller())
    await began.wait()
    task.cancel()
    goes_on.set()
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["work", "caller"]
