"""The lock engine alone: what it grants, and that it returns only when the file is free."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpulane.adapters.base import EngineRequest, HeaderList
from gpulane.core.model import (
    Account,
    EngineUrl,
    Gpu,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Service,
)
from gpulane.engine.base import AttemptContext, Found, Outcome
from gpulane.engine.lock import Grants, LockClient
from gpulane.engine.progress import ProgressHub

pytestmark = pytest.mark.anyio


@dataclass(slots=True)
class File:
    """A lock file that is held as the test says."""

    holder: str | None = None
    path: Path = Path("/nowhere/gpu0.lock")

    def held_by(self) -> str | None:
        return self.holder


@dataclass(slots=True)
class Sink:
    """What the holder hears."""

    lines: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    is_finished: bool = False

    def begin(self, status: int, headers: HeaderList) -> None:
        assert status == 200

    def write(self, chunk: bytes) -> None:
        self.lines.append(json.loads(chunk))

    def finish(self) -> None:
        self.is_finished = True

    def fail(self, error: Exception) -> None:
        raise AssertionError(error)

    @property
    def events(self) -> list[object]:
        return [line["event"] for line in self.lines]


class Scene:
    """One gpu, one lock job."""

    def __init__(self, **terms: object) -> None:
        self.file, self.sink, self.grants, self.hub = File(), Sink(), Grants(), ProgressHub()
        gpu = Gpu(id=GpuId("box/gpu0"), node=NodeId("n"), name="gpu0", uuid="GPU-1", engines=())
        self.client = LockClient(gpu, self.file, self.grants)
        self.job = Job(id=JobId("j"), account=Account("ann"), service=Service.LOCK, kind="lock")
        self.attempt = AttemptContext(
            job=self.job,
            request=EngineRequest(method="LOCK", target="/"),
            meta=json.dumps(terms).encode(),
            hub=self.hub,
            answer=self.sink,
        )
        self.task: asyncio.Task[Outcome] | None = None

    async def granted(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self.client.run(self.attempt))
        while not self.sink.lines:
            await asyncio.sleep(0)
        assert self.sink.events == ["granted"]

    async def outcome(self) -> Outcome:
        assert self.task is not None
        async with asyncio.timeout(5):
            return await self.task


async def test_released_it_returns_when_the_file_is_free() -> None:
    scene = Scene(seconds_max=60, note="training")
    assert scene.client.known_idle() is True
    await scene.granted()
    assert scene.client.url == EngineUrl("lock:box/gpu0")
    assert scene.sink.lines[0]["lock_file"] == "/nowhere/gpu0.lock"
    scene.file.holder = "locked by pid 7"
    assert scene.client.known_idle() is False
    assert (await scene.client.probe(frozenset())).strange_jobs == (), "it is our holder"
    assert scene.grants.hold(scene.job.id) is True
    assert scene.grants.release(scene.job.id) and not scene.grants.release(scene.job.id)
    while not scene.sink.is_finished:
        await asyncio.sleep(0)
    assert scene.task is not None
    assert not scene.task.done()
    last = scene.hub.last(scene.job.id)
    assert last is not None and last.text is not None and "locked by pid 7" in last.text
    scene.file.holder = None
    assert (await scene.outcome()).state is JobState.SUCCEEDED
    assert scene.sink.events == ["granted", "released"]
    assert scene.client.known_idle() is True


async def test_a_time_limit_a_cancel_and_a_gone_holder() -> None:
    scene = Scene(seconds_max=0.01)
    await scene.granted()
    outcome = await scene.outcome()
    assert outcome.failure is not None and outcome.failure.code == "time_limit"
    scene = Scene()
    await scene.granted()
    scene.attempt.cancel_wanted.set()
    assert (await scene.outcome()).state is JobState.CANCELLED
    assert scene.sink.events == ["granted", "cancelled"]
    scene = Scene()
    await scene.granted()
    assert scene.grants.abandon(scene.job.id)
    outcome = await scene.outcome()
    assert outcome.failure is not None and outcome.failure.code == "holder_gone"
    assert not scene.grants.abandon(scene.job.id)


async def test_a_holder_is_confirmed_only_with_the_file_and_in_time() -> None:
    scene = Scene()
    assert scene.grants.hold(scene.job.id) is None
    await scene.granted()
    assert scene.grants.hold(scene.job.id) is False
    scene.attempt.cancel_wanted.set()
    await scene.outcome()
    scene.file.holder = "locked by pid 7"
    assert scene.grants.hold(scene.job.id) is None, "too late: it must let go again"


async def test_nothing_is_granted_that_nobody_wants_any_more() -> None:
    scene = Scene()
    scene.attempt.cancel_wanted.set()
    assert (await scene.client.run(scene.attempt)).state is JobState.CANCELLED
    assert scene.sink.lines == []


async def test_a_strangers_lock_is_strange_work() -> None:
    scene = Scene()
    scene.file.holder = "locked by pid 7 (train.py)"
    report = await scene.client.probe(frozenset())
    assert (report.idle, report.strange_jobs) == (False, ("locked by pid 7 (train.py)",))
    assert await scene.client.find(scene.job.id) is Found.BUSY
    scene.file.holder = None
    assert await scene.client.find(scene.job.id) is Found.ABSENT
    assert (await scene.client.describe()).offers is None
