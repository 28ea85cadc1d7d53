"""Server-sent events over real sockets: what is told, in which order, to whom, and taken up again how."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from gpulane.core.model import JobId
from gpulane.engine.progress import Progress
from tests.integration.web.conftest import BOUND_SECONDS, Door, Doors
from tests.integration.web.test_api import ANN, BOB, JOBS, OPS, keyed, submitted

pytestmark = pytest.mark.anyio

Event = tuple[str, str | None, dict[str, Any]]


class Reader:
    """Reads a stream as a browser does."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.last_id: str | None = None

    async def next(self) -> Event | None:
        """Return the next event; None at the end."""
        kind, data = "message", b""
        async with asyncio.timeout(BOUND_SECONDS):
            while line := await self._answer.content.readline():
                name, _, value = line.rstrip(b"\n").partition(b": ")
                match name:
                    case b"event":
                        kind = value.decode()
                    case b"id":
                        self.last_id = value.decode()
                    case b"data":
                        data += value
                    case b"" if data:
                        document = msgspec.json.decode(data, type=dict[str, Any])
                        assert document["v"] == 1
                        return kind, self.last_id, document
                    case _:
                        pass
        return None

    async def until(self, kind: str, **wanted: object) -> dict[str, Any]:
        """Skip to the next event of this kind with these values."""
        while event := await self.next():
            if event[0] == kind and wanted.items() <= event[2].items():
                return event[2]
        raise AssertionError(f"the stream ended before {kind} {wanted}")

    async def rest(self) -> list[Event]:
        """Read to the end."""
        events: list[Event] = []
        while event := await self.next():
            events.append(event)
        return events


@asynccontextmanager
async def follow(door: Door, path: str, **headers: str) -> AsyncIterator[Reader]:
    async with door.client.get(path, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        yield Reader(answer)


async def test_job_is_followed_to_its_end(door: Door) -> None:
    job = JobId((await submitted(door))["id"])
    async with follow(door, f"{JOBS}/{job}/events") as reader:
        assert (await reader.until("job"))["job"]["state"] == "queued"
        assert (await reader.until("position"))["position"] == 1
        await door.gateway.start(job)
        assert (await reader.until("state", what="claimed"))["gpu"] == "box/gpu0"
        await reader.until("state", what="started", state="running")
        door.gateway.hub.publish(Progress(job=job, value=1, max=4, image=b"jpeg", image_type="image/jpeg"))
        assert (await reader.until("progress"))["max"] == 4.0
        assert base64.b64decode((await reader.until("preview"))["data"]) == b"jpeg"
        await door.gateway.finish(job)
        rest = await reader.rest()
    assert [kind for kind, _, _ in rest if kind != "position"] == ["state", "job"]
    assert rest[-1][2]["job"]["state"] == "succeeded"


async def test_ended_job_is_told_once(door: Door) -> None:
    job = JobId((await submitted(door))["id"])
    await door.json("DELETE", f"{JOBS}/{job}")
    async with follow(door, f"{JOBS}/{job}/events") as reader:
        rest = await reader.rest()
        assert [kind for kind, _, _ in rest] == ["job"]
    async with door.client.get(
        f"{JOBS}/{job}/events", headers={"Last-Event-ID": str(reader.last_id)}
    ) as answer:
        assert answer.status == 204


async def test_stream_is_taken_up_where_it_broke(door: Door) -> None:
    job = JobId((await submitted(door))["id"])
    async with follow(door, f"{JOBS}/{job}/events") as reader:
        await reader.until("job")
        last = str(reader.last_id)
    await door.gateway.start(job)
    async with follow(door, f"{JOBS}/{job}/events", **{"Last-Event-ID": last}) as reader:
        event = await reader.next()
        assert event is not None and event[0] == "state" and event[2]["what"] == "claimed"
        await reader.until("state", what="started")
    async with follow(door, f"{JOBS}/{job}/events", **{"Last-Event-ID": "other-5"}) as reader:
        event = await reader.next()
        assert event is not None and event[0] == "job" and event[2]["job"]["state"] == "running"


async def test_queue_stream_tells_each_only_what_is_theirs(doors: Doors) -> None:
    door = await doors.open(keyed())
    path = "/gpulane/v1/events"
    async with follow(door, path, **BOB) as bob, follow(door, path, **OPS) as ops:
        assert (await bob.until("gpus"))["gpus"] == []
        assert (await bob.until("queue"))["queue"]["waiting"] == 1
        await ops.until("queue")
        anns = JobId((await submitted(door, headers=ANN))["id"])
        bobs = JobId((await submitted(door, headers=BOB))["id"])
        assert (await bob.until("state"))["id"] == bobs
        told = await ops.until("state", what="submitted")
        assert (told["id"], told["user"], told["service"]) == (anns, "ann", "comfyui")
        await door.gateway.start(anns)
        door.gateway.hub.publish(Progress(job=anns, value=1, max=2))
        assert (await ops.until("progress"))["id"] == anns
        await door.json("DELETE", f"{JOBS}/{bobs}", headers=BOB)
        assert (await bob.until("state", what="ended"))["id"] == bobs


async def test_counts_are_told_only_when_they_change(door: Door) -> None:
    async with follow(door, "/gpulane/v1/events") as reader:
        assert (await reader.until("queue"))["reload"] is True
        await door.json("POST", "/gpulane/v1/queue/pause")
        told = await reader.until("queue")
        assert told["queue"]["paused"] is True and told["reload"] is False


async def test_streams_end_with_the_server(doors: Doors) -> None:
    door = await doors.open()
    async with follow(door, "/gpulane/v1/events") as reader:
        await reader.until("queue")
        door_stack = doors.runners.pop()
        async with asyncio.timeout(BOUND_SECONDS):
            await door_stack.cleanup()
        with pytest.raises((AssertionError, aiohttp.ClientError)):
            await reader.until("never")
