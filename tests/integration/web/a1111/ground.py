"""A1111's front door over the stand-in gateway and simulated engines; a little loop plays the dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from gpulane.adapters.a1111.catalogue import DOCUMENTS, digest, offers, read_catalogue
from gpulane.config import Settings
from gpulane.core.events import CancelWanted, JobEnded, JobSubmitted, StoreEvent
from gpulane.core.model import (
    ENDED,
    ClaimId,
    EngineState,
    EngineUrl,
    GpuId,
    JobId,
    JobState,
    ModelKey,
    Service,
)
from gpulane.engine.base import Description
from gpulane.engine.progress import Progress
from gpulane.errors import GpulaneError
from gpulane.relay import hold
from gpulane.store.base import ClaimCandidate, ClaimRequest, Code, JobRecord
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.views import EngineView
from gpulane.web.a1111 import A1111Front
from gpulane.web.app import build_app, make_runner
from gpulane.web.ports import WebContext
from gpulane.wire import EngineClient
from tests.integration.web.standin import GPU, NODE, StandIn

BOUND_SECONDS = 15.0
POLL_SECONDS = 0.01
ANN, BOB, EVE = "key-of-ann", "key-of-bob", "key-of-eve"
"""Ann and Bob are users, Eve is an admin."""


class Ended(GpulaneError):
    """A held job ended without an answer."""


class Gateway(StandIn):
    """The stand-in, with an engine that runs what is submitted while the gate is open."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings=settings)
        self.gate = asyncio.Event()
        self.gate.set()
        self.submitted: asyncio.Queue[JobId] = asyncio.Queue()
        self.ended: list[JobEnded] = []
        self.wanted_cancels: set[JobId] = set()
        self.listen(self._hear)

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        for event in events:
            match event:
                case JobSubmitted():
                    self.submitted.put_nowait(event.job.id)
                case CancelWanted():
                    self.wanted_cancels.add(event.job)
                case JobEnded():
                    self._end(event)
                case _:
                    pass

    def _end(self, event: JobEnded) -> None:
        self.ended.append(event)
        answer = self.answers.get(event.job)
        if answer is not None and not answer.is_ended:
            error = Ended(event.failure.message if event.failure else "the job was cancelled")
            error.code = event.failure.code if event.failure else "cancelled"
            answer.fail(error)

    async def start(self, job: JobId) -> None:
        """Claim and start it for the first engine, so that its record names that."""
        engine = self.engine_views[0].url
        claim = ClaimRequest(
            node=NODE,
            boot=1,
            gpu=GPU,
            claim=ClaimId(job.replace("-", "")[:16]),
            lease_seconds=60.0,
            candidates=(ClaimCandidate(job=job, engine=engine, charge_seconds=1.0),),
        )
        reply = await self.store.claim(claim)
        assert reply.code is Code.OK and reply.token is not None
        self._tokens[job] = reply.token
        assert (await self.store.start(job, reply.token)).code is Code.OK
        self.gpu_views = [replace(view, job=job) for view in self.gpu_views]

    async def play(self) -> None:
        """Run what is submitted, one after the other."""
        while True:
            job = await self.submitted.get()
            await self.gate.wait()
            record = await self.record(job)
            if record is not None and record.state not in ENDED:
                await self._run(job)

    async def _run(self, job: JobId) -> None:
        await self.start(job)
        request = self.requests[job]
        client = self.wire(self.engine_views[0].url)
        async with asyncio.TaskGroup() as tasks:
            beside = tasks.create_task(self._beside(job, client))
            response = await client.request(request.method, request.target, request.headers, request.body)
            await hold(response, self.answers[job])
            beside.cancel()
        self.gpu_views = [replace(view, job=None) for view in self.gpu_views]
        await self.finish(job, state=JobState.SUCCEEDED)

    async def _beside(self, job: JobId, client: EngineClient) -> None:
        """Publish progress, and pass a wanted interrupt on once."""
        is_interrupted = False
        while True:
            _, body = await client.get_json("/sdapi/v1/progress")
            told = msgspec.json.decode(body, type=dict[str, Any])
            self.hub.publish(Progress(job=job, value=told["progress"], max=1.0))
            if job in self.wanted_cancels and not is_interrupted:
                is_interrupted = True
                async with await client.request("POST", "/sdapi/v1/interrupt", body=b""):
                    pass
            await asyncio.sleep(POLL_SECONDS)

    async def only(self) -> JobRecord:
        """Return the record of the only job."""
        (job,) = self.answers
        record = await self.record(job)
        assert record is not None
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a test stands on."""

    gateway: Gateway
    sims: tuple[SimA1111, ...]
    url: str
    front: A1111Front
    client: aiohttp.ClientSession

    async def ask(
        self, method: str, path: str, *, key: str = ANN, status: int = 200, body: object = None
    ) -> Any:
        """Ask, check the status, return the JSON."""
        sent = None if body is None else msgspec.json.encode(body)
        headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        async with self.client.request(method, path, headers=headers, data=sent) as answer:
            told = await answer.read()
            assert answer.status == status, (answer.status, told[:500])
            return msgspec.json.decode(told) if told else None

    def is_held(self) -> bool:
        """Whether a call has come."""
        return bool(self.gateway.answers)

    def has_steps(self) -> bool:
        """Whether the engine is in the middle of a job."""
        return any(sim.state.job_count > 0 and sim.state.sampling_step > 0 for sim in self.sims)


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What `ground` is made of."""

    checkpoints: tuple[tuple[str, ...], ...] = (("alpha.safetensors", "beta.safetensors"),)
    """One engine for each."""
    time_scale: float = 0.02
    limits: dict[str, Any] = field(default_factory=dict[str, Any])
    forge: bool = False


async def until(condition: Callable[[], bool]) -> None:
    """Poll it, within a bound."""
    async with asyncio.timeout(BOUND_SECONDS):
        while not condition():
            await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def ground(folder: Path, wanted: Wanted | None = None) -> AsyncIterator[Ground]:
    """Start engines, gateway and front door; end them."""
    wanted = wanted or Wanted()
    async with contextlib.AsyncExitStack() as stack:
        gateway = Gateway(folder, settings(wanted))
        context = await gateway.open()
        stack.push_async_callback(gateway.close)
        sims: list[SimA1111] = []
        for number, files in enumerate(wanted.checkpoints):
            card = Card(options=CardOptions(time_scale=wanted.time_scale))
            sim = SimA1111(card=card, checkpoints=files, plain_pictures=True, forge=wanted.forge)
            await stack.enter_async_context(sim)
            sims.append(sim)
            client = EngineClient(sim.url)
            gateway.add_engine(await view(sim, client, number), client=client)
        front = A1111Front(context)
        url = await serve(stack, context, front)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        playing = tasks.create_task(gateway.play())
        stack.callback(playing.cancel)
        timeout = aiohttp.ClientTimeout(total=BOUND_SECONDS)
        client_session = await stack.enter_async_context(aiohttp.ClientSession(url, timeout=timeout))
        yield Ground(gateway=gateway, sims=tuple(sims), url=url, front=front, client=client_session)


def settings(wanted: Wanted) -> Settings:

    told = {
        "ann": (ANN, "user"),
        "bob": (BOB, "user"),
        "eve": (EVE, "admin"),
        "vic": ("key-of-vic", "viewer"),
    }
    keys = [
        {"account": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "role": role}
        for name, (key, role) in told.items()
    ]
    return msgspec.convert({"keys": keys, "limits": wanted.limits}, Settings)


async def view(sim: SimA1111, client: EngineClient, number: int) -> EngineView:
    """Describe an engine as its client would."""
    documents: dict[str, bytes] = {}
    for name, target in DOCUMENTS.items():
        status, body = await client.get_json(target)
        if status == 200:
            documents[name] = body
    about = Description(
        service=Service.A1111,
        flavor="a1111",
        version="1.10.1",
        offers=offers(read_catalogue(documents)),
        documents=documents,
        digest=digest(documents),
    )
    return EngineView(
        url=EngineUrl(sim.url),
        service=Service.A1111,
        name="",
        gpu=GPU if number == 0 else GpuId(f"box/gpu{number}"),
        state=EngineState.READY,
        why="",
        model=ModelKey(""),
        description=about,
    )


async def serve(stack: contextlib.AsyncExitStack, context: WebContext, front: A1111Front) -> str:
    app = build_app(context, {Service.A1111: front})
    runner = make_runner(app, shutdown_seconds=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"
