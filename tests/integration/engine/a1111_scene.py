"""A simulated A1111 with our client on it, and short waits: what the tests of the client share."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp

from gpulane.adapters.a1111.catalogue import Catalogue, read_catalogue
from gpulane.adapters.a1111.requests import RequestContext, recognize
from gpulane.core.model import Account, EngineUrl, Job, JobId, Service
from gpulane.engine.a1111 import A1111Client
from gpulane.engine.a1111.pace import Pace
from gpulane.engine.base import AnswerSink, AttemptContext, Outcome
from gpulane.engine.progress import Progress, ProgressHub
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.faults import Faults

WAIT_SECONDS = 10.0
CHECKPOINTS = ("tinyA.safetensors", "xl/tinyB.safetensors")
QUICK = Pace(
    poll_seconds=0.03,
    poll_cold_seconds=0.02,
    poll_nowebui_seconds=0.03,
    quiet_seconds=0.2,
    silent_seconds_max=1.0,
    forgotten_seconds=0.3,
)


@dataclass
class Sink:
    """Takes an answer, and remembers in which order it was told what."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytearray = field(default_factory=bytearray)
    is_finished: bool = False
    error: Exception | None = None
    refuse: Exception | None = None

    def begin(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        self.status, self.headers = status, tuple(headers)

    def write(self, chunk: bytes) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.body += chunk

    def finish(self) -> None:
        self.is_finished = True

    def fail(self, error: Exception) -> None:
        self.error = error

    def json(self) -> Any:
        return json.loads(bytes(self.body))


@dataclass
class Scene:
    """One engine, one client, and all that was published."""

    sim: SimA1111
    client: A1111Client
    catalogue: Catalogue = field(default_factory=Catalogue)
    hub: ProgressHub = field(default_factory=ProgressHub)
    heard: list[Progress] = field(default_factory=list[Progress])

    def attempt(
        self, payload: dict[str, Any], *, endpoint: str = "txt2img", answer: AnswerSink | None = None
    ) -> AttemptContext:
        job = JobId(str(uuid4()))
        context = RequestContext(job=job, catalogue=self.catalogue)
        known = recognize(f"/sdapi/v1/{endpoint}", json.dumps(payload).encode(), context)
        return AttemptContext(
            job=Job(
                id=job, account=Account("ann"), service=Service.A1111, kind=known.kind, model=known.model
            ),
            request=known.request,
            meta=known.meta,
            hub=self.hub,
            answer=answer,
        )

    async def run(self, payload: dict[str, Any], **more: Any) -> Outcome:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.client.run(self.attempt(payload, **more))

    @asynccontextmanager
    async def running(self, attempt: AttemptContext) -> AsyncIterator["asyncio.Task[Outcome]"]:
        """Run an attempt beside the block, which starts once the engine is at work on it."""
        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.client.run(attempt))
            await until(lambda: self.sim.sim_state()["running"] == attempt.job.id)
            yield task

    async def post(self, target: str, value: object = None) -> int:
        """Somebody else, past the gateway."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.sim.url + target, json=value) as answer,
        ):
            await answer.read()
            return answer.status

    @property
    def runs(self) -> int:
        return self.sim.runs


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, looking often."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def scene(
    *,
    pace: Pace = QUICK,
    load_seconds: float = 0.05,
    faults: Faults | None = None,
    timeout_seconds: float = 2.0,
    **engine: Any,
) -> AsyncIterator[Scene]:
    options = CardOptions(
        seconds_per_step=0.08, load_seconds=dict.fromkeys(CHECKPOINTS, load_seconds), model_gib={}
    )
    card = Card(options=options)
    async with SimA1111(
        card=card, checkpoints=CHECKPOINTS, plain_pictures=True, faults=faults, **engine
    ) as sim:
        client = A1111Client(EngineUrl(sim.url), pace=pace, timeout_seconds=timeout_seconds)
        here = Scene(sim, client)
        here.hub.listen(here.heard.append)
        here.catalogue = read_catalogue((await client.describe()).documents)
        try:
            yield here
        finally:
            await here.client.close()
