"""A small gateway in memory for ComfyUI's front door: real store, real hub, no dispatcher.

The test itself plays the dispatcher: it claims and starts jobs, says what an engine would say, or lets the
engine client run them on a simulated engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import struct
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from gpulane.adapters.base import EngineRequest, decode_request, encode_request
from gpulane.config import KeySettings, Settings
from gpulane.config.settings import RoleName
from gpulane.core.events import CancelWanted, StoreEvent
from gpulane.core.model import (
    NO_MODEL,
    Account,
    Band,
    ClaimId,
    EngineState,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Service,
    Token,
)
from gpulane.engine.base import Artifact, AttemptContext, Description, Outcome, RecordedResult
from gpulane.engine.comfyui import ComfyUIClient
from gpulane.engine.progress import Progress, ProgressHub
from gpulane.errors import Conflict, Impossible, Throttled
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import (
    Again,
    ClaimCandidate,
    ClaimRequest,
    Code,
    JobQuery,
    JobRecord,
    Listener,
    NewJob,
    QueueLimits,
    Reply,
)
from gpulane.store.memory import MemoryStore
from gpulane.testing.comfyui import SimComfyUI
from gpulane.views import EngineView, GpuView, HeldCall, Place, QueueView
from gpulane.web.app import build_app, make_runner
from gpulane.web.comfyui import ComfyUIFront
from gpulane.web.ports import WebContext
from gpulane.wire import EngineClient

NODE = NodeId("n1")
PATIENCE_SECONDS = 15.0
ANN, BOB, EVE, VIC = "key-of-ann", "key-of-bob", "key-of-eve", "key-of-vic"
"""Ann and Bob are users; Eve is an operator, who may do more but sees nobody's jobs here either; Vic may only
look.
"""
ROLES: dict[str, RoleName] = {ANN: "user", BOB: "user", EVE: "operator", VIC: "viewer"}

Json = dict[str, object]


@dataclass
class GatewayJobs:
    """JobsPort over a store in memory. `steps` are what a dispatcher would do."""

    engines: GatewayEngines
    queued_max: int = 1000
    hub: ProgressHub = field(default_factory=ProgressHub)
    artifacts: dict[tuple[JobId, int], Path] = field(default_factory=dict[tuple[JobId, int], Path])
    tokens: dict[JobId, Token] = field(default_factory=dict[JobId, Token])
    cancels: dict[JobId, asyncio.Event] = field(default_factory=dict[JobId, asyncio.Event])
    is_ready: bool = True
    _listeners: list[Listener] = field(default_factory=list[Listener])
    _claims: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.store = MemoryStore(time.time)
        self.store.listen(self._hear)

    async def open(self) -> None:
        await self.store.open()
        gpus = tuple((view.gpu, f"uuid-{number}") for number, view in enumerate(self.engines.views))
        await self.store.register(NODE, 1, gpus, "box")

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        for event in events:
            if isinstance(event, CancelWanted) and event.job in self.cancels:
                self.cancels[event.job].set()
        for listener in tuple(self._listeners):
            listener(events)

    # --- JobsPort

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        offers = [v.description.offers for v in self.engines.views if v.description and v.description.offers]
        if offers and not any(new.job.needs <= offer for offer in offers):
            raise Impossible("No gpu can run this: box/gpu0 lacks something.")
        stored = dataclasses.replace(new, body=encode_request(request))
        reply = await self.store.enqueue(stored, QueueLimits(queued_max=self.queued_max))
        match reply.code:
            case Code.CONFLICT:
                raise Conflict("The same id was used before with other content.")
            case Code.FULL | Code.ACCOUNT_FULL:
                raise Throttled("The queue is full.", retry_after_seconds=7.0)
            case _:
                return reply

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        raise NotImplementedError

    def answered(self, job: JobId) -> None:
        raise NotImplementedError

    def leave(self, job: JobId) -> None:
        raise NotImplementedError

    def held_answer(self, job: JobId) -> HeldAnswer | None:
        return None

    async def cancel(self, job: JobId) -> Reply:
        return await self.store.cancel(job)

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply:
        return await self.store.prioritise(job, band, priority)

    async def record(self, job: JobId) -> JobRecord | None:
        return await self.store.job(job)

    async def record_of_client(
        self, account: Account, service: Service, client_job_id: str
    ) -> JobRecord | None:
        return await self.store.job_of_client(account, service, client_job_id)

    async def records(self, query: JobQuery) -> tuple[JobRecord, ...]:
        return await self.store.jobs(query)

    async def body(self, job: JobId) -> bytes | None:
        return await self.store.body(job)

    async def result(self, job: JobId) -> RecordedResult | None:
        stored = await self.store.result(job)
        return None if stored is None else msgspec.json.decode(stored, type=RecordedResult)

    async def artifact(self, job: JobId, number: int) -> Path | None:
        return self.artifacts.get((job, number))

    async def forget(self, job: JobId) -> Reply:
        return await self.store.forget(job)

    def place(self, job: JobId) -> Place:
        return Place(position=None, reason=None, estimated_start_seconds=None)

    def gpus(self) -> tuple[GpuView, ...]:
        return ()

    def queue(self) -> QueueView:
        return QueueView(waiting=0, running=0, paused=False, waiting_by_service={})

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        return await self.store.drain(gpu, draining)

    async def pause(self, paused: bool) -> Reply:
        return await self.store.pause(paused)

    def listen(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- what a dispatcher would do

    async def claim(self, job: JobId, engine: int = 0) -> None:
        view = self.engines.views[engine]
        request = ClaimRequest(
            node=NODE,
            boot=1,
            gpu=view.gpu,
            claim=ClaimId(f"c{next(self._claims)}"),
            lease_seconds=60.0,
            candidates=(ClaimCandidate(job=job, engine=view.url, charge_seconds=1.0),),
        )
        reply = await self.store.claim(request)
        assert reply.code is Code.OK, reply
        assert reply.token is not None
        self.tokens[job] = reply.token

    async def start(self, job: JobId, engine: int = 0) -> None:
        await self.claim(job, engine)
        self.cancels[job] = asyncio.Event()
        assert (await self.store.start(job, self.tokens[job])).code is Code.OK

    async def run(self, job: JobId, engine: int = 0) -> Outcome:
        """Let the real engine client run the job on a simulated engine, and record how it ended."""
        await self.start(job, engine)
        record, body = await self.record(job), await self.body(job)
        assert record is not None
        assert body is not None
        attempt = AttemptContext(
            job=record.job,
            request=decode_request(body),
            meta=record.meta,
            hub=self.hub,
            cancel_wanted=self.cancels[job],
        )
        outcome = await self.engines.clients[engine].run(attempt)
        await self.finish(job, outcome.state, result=outcome.result, failure=outcome.failure)
        return outcome

    async def finish(
        self,
        job: JobId,
        state: JobState = JobState.SUCCEEDED,
        *,
        result: RecordedResult | None = None,
        failure: Failure | None = None,
    ) -> Reply:
        if state is JobState.FAILED and failure is None:
            failure = Failure(kind=FailureKind.ENGINE, code="out_of_memory", message="CUDA out of memory")
        stored = None if result is None else msgspec.json.encode(result)
        reply = await self.store.finish(
            job, self.tokens[job], state=state, failure=failure, used_seconds=1.0, result=stored
        )
        assert reply.code is Code.OK, reply
        return reply

    async def fail_attempt(self, job: JobId) -> None:
        failure = Failure(kind=FailureKind.LOST, code="engine_lost", message="the engine restarted")
        again = Again(rest_seconds=0.0, avoid=frozenset(), refund=True)
        reply = await self.store.fail(job, self.tokens[job], failure, again, used_seconds=1.0)
        assert reply.code is Code.OK, reply

    def say(self, job: JobId, kind: str, **data: object) -> None:
        """Publish what an engine would say of the job."""
        message = msgspec.json.encode({"type": kind, "data": data | {"prompt_id": job}})
        self.hub.publish(Progress(job=job, message=message))

    def show(self, job: JobId, picture: bytes = b"\xff\xd8\xff\xe0picture") -> None:
        """Publish a preview with metadata."""
        metadata = msgspec.json.encode({"node_id": "1", "prompt_id": job, "image_type": "image/jpeg"})
        frame = struct.pack(">II", 4, len(metadata)) + metadata + picture
        self.hub.publish(Progress(job=job, image=picture, image_type="image/jpeg", binary=frame))


@dataclass
class GatewayEngines:
    """EnginesPort over simulated engines."""

    views: list[EngineView] = field(default_factory=list[EngineView])
    wires: dict[EngineUrl, EngineClient] = field(default_factory=dict[EngineUrl, EngineClient])
    clients: list[ComfyUIClient] = field(default_factory=list[ComfyUIClient])

    async def add(self, sim: SimComfyUI) -> None:
        url = EngineUrl(sim.url)
        client = ComfyUIClient(url)
        await client.open()
        self.clients.append(client)
        self.wires[url] = EngineClient(url)
        self.views.append(_view(url, len(self.views), await client.describe()))

    def pretend(self, description: Description | None = None) -> None:
        """Add an engine that nothing listens for."""
        url = EngineUrl(f"http://127.0.0.1:{9 + len(self.views)}")
        self.wires[url] = EngineClient(url)
        self.views.append(_view(url, len(self.views), description))

    def lose(self, number: int) -> None:
        self.views[number] = dataclasses.replace(self.views[number], state=EngineState.LOST, why="gone")

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for wire in self.wires.values():
            await wire.close()

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return tuple(view for view in self.views if service in {None, view.service})

    def wire(self, engine: EngineUrl) -> EngineClient:
        return self.wires[engine]

    def sticky(self, service: Service, key: str) -> EngineView | None:
        live = [view for view in self.engines(service) if view.state is EngineState.READY]
        return live[int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(live)] if live else None


def _view(url: EngineUrl, number: int, description: Description | None) -> EngineView:
    return EngineView(
        url=url,
        service=Service.COMFYUI,
        name="",
        gpu=GpuId(f"box/gpu{number}"),
        state=EngineState.READY,
        why="",
        model=NO_MODEL,
        description=description,
    )


class NoValues:
    """ValuesPort that keeps nothing."""

    async def account_get(self, account: Account, kind: str) -> bytes | None:
        return None

    async def account_put(self, account: Account, kind: str, value: bytes) -> None:
        pass


@dataclass
class Gateway:
    """One running front door."""

    url: str
    jobs: GatewayJobs
    engines: GatewayEngines
    front: ComfyUIFront
    folder: Path

    @contextlib.asynccontextmanager
    async def person(self, key: str) -> AsyncIterator[aiohttp.ClientSession]:
        """A client that sends this key."""
        timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
        async with aiohttp.ClientSession(self.url, headers={"X-Api-Key": key}, timeout=timeout) as session:
            yield session


def settings() -> Settings:
    """The settings of a gateway with keys."""
    keys = tuple(
        KeySettings(
            account=key.removeprefix("key-of-"), sha256=hashlib.sha256(key.encode()).hexdigest(), role=role
        )
        for key, role in ROLES.items()
    )
    return Settings(keys=keys)


@contextlib.asynccontextmanager
async def gateway(
    folder: Path,
    *sims: SimComfyUI,
    engines: int = 1,
    jobs: GatewayJobs | None = None,
    has_keys: bool = True,
) -> AsyncIterator[Gateway]:
    """Serve the front door on a free port, over these engines (or some that nothing listens for)."""
    if jobs is None:
        known = GatewayEngines()
        for sim in sims:
            await known.add(sim)
        while len(known.views) < engines:
            known.pretend()
        jobs = GatewayJobs(known)
        await jobs.open()
    context = WebContext(
        settings=settings() if has_keys else Settings(),
        jobs=jobs,
        engines=jobs.engines,
        values=NoValues(),
        data_folder=folder,
        new_job_id=lambda: JobId(str(uuid.uuid4())),
    )
    front = ComfyUIFront(context)
    runner = make_runner(build_app(context, {Service.COMFYUI: front}), shutdown_seconds=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield Gateway(
            url=f"http://{host}:{port}", jobs=jobs, engines=jobs.engines, front=front, folder=folder
        )
    finally:
        await front.close()
        await runner.cleanup()
        await jobs.engines.close()


# --- prompts and sockets --------------------------------------------------------------------------


def prompt(seed: int = 1, *, node: str = "EmptyImage", prefix: str = "rec") -> Json:
    """A workflow that every ComfyUI can run."""
    inputs: Json = {"width": 64, "height": 64, "batch_size": 1, "color": seed}
    return {
        "1": {"class_type": node, "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def slow_prompt(seed: int = 1, *, steps: int = 5, delay: float = 0.05, preview: bool = True) -> Json:
    """A workflow of a test node that takes its time."""
    inputs: Json = {"steps": steps, "delay": delay, "seed": seed, "preview": preview}
    return {
        "1": {"class_type": "SimSlow", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "rec"}},
    }


async def submit(session: aiohttp.ClientSession, graph: Json | None = None, **more: object) -> str:
    """Post a prompt and return its id."""
    body = {"prompt": graph or prompt()} | more
    async with session.post("/prompt", json=body) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        return str(told["prompt_id"])


def result_of(job: JobId, outputs: Json | None = None, *names: str) -> RecordedResult:
    """The entry that an engine would have in its history."""
    extra = {"create_time": 1, "client_id": "the-gateways-own"}
    messages = [
        ["execution_start", {"prompt_id": job, "timestamp": 1}],
        ["execution_success", {"prompt_id": job}],
    ]
    document = {
        "prompt": [0, job, prompt(), extra, ["2"]],
        "outputs": outputs or {},
        "status": {"status_str": "success", "completed": True, "messages": messages},
        "meta": {},
    }
    files = tuple(
        Artifact(name=name, target=f"/view?filename={name}&subfolder=&type=output") for name in names
    )
    return RecordedResult(document=msgspec.Raw(msgspec.json.encode(document)), artifacts=files)


class Ear:
    """A client's WebSocket that keeps what it hears."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.heard: list[Json | bytes] = []
        self.counts: Counter[str] = Counter()
        self.is_closed = False
        self._news = asyncio.Event()

    async def listen(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.heard.append(msgspec.json.decode(message.data, type=dict[str, object]))
            elif message.type is aiohttp.WSMsgType.BINARY:
                self.heard.append(bytes(message.data))
            self.counts[label(self.heard[-1])] += 1
            self._news.set()
        self.is_closed = True
        self._news.set()

    @property
    def kinds(self) -> list[str]:
        """What was heard, in order, without status."""
        return [kind for kind in map(label, self.heard) if kind != "status"]

    def all(self, kind: str) -> list[Json]:
        return [m["data"] for m in self.heard if isinstance(m, dict) and label(m) == kind]  # pyright: ignore[reportReturnType]

    async def until(self, is_there: Callable[[Ear], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_there(self):
                self._news.clear()
                await self._news.wait()

    async def until_kind(self, kind: str, times: int = 1) -> None:
        await self.until(lambda ear: ear.counts[kind] >= times)


def label(message: Json | bytes) -> str:
    """Name a message as the tests speak of it."""
    if isinstance(message, bytes):
        return f"frame {int.from_bytes(message[:4], 'big')}"
    data = msgspec.convert(message.get("data"), dict[str, object])
    is_end = message["type"] == "executing" and data.get("node") is None
    return "run over" if is_end else str(message["type"])


@contextlib.asynccontextmanager
async def ear(
    session: aiohttp.ClientSession, client_id: str | None = "c1", *, metadata: bool = True
) -> AsyncIterator[Ear]:
    """Open a socket, greet, and listen."""
    path = "/ws" if client_id is None else f"/ws?clientId={client_id}"
    async with session.ws_connect(path) as socket:
        heard = Ear(socket)
        listening = asyncio.create_task(heard.listen())
        try:
            await heard.until(lambda e: len(e.heard) > 0)
            if metadata:
                await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                await heard.until_kind("feature_flags")
            yield heard
        finally:
            await socket.close()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
