"""A small real gateway for the front doors' tests: jobs in a MemoryStore, held answers, engines given to it.

It decides nothing: the test starts and ends jobs by hand.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpulane.adapters.base import EngineRequest, encode_request
from gpulane.config import Settings
from gpulane.core.events import StoreEvent
from gpulane.core.model import (
    ENDED,
    Account,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    GpuId,
    GpuState,
    JobId,
    JobState,
    NodeId,
    Service,
    Token,
)
from gpulane.engine.base import Artifact, RecordedResult
from gpulane.engine.progress import ProgressHub
from gpulane.errors import Conflict, Throttled
from gpulane.relay import HeldAnswer
from gpulane.store.base import (
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
from gpulane.views import EngineView, GpuView, HeldCall, Place, QueueView, Reason
from gpulane.web.ports import WebContext
from gpulane.wire import EngineClient

NODE = NodeId("node-1")
GPU = GpuId("box/gpu0")


class StandIn:
    """JobsPort, EnginesPort and ValuesPort in one."""

    def __init__(self, folder: Path, *, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.folder = folder
        self.store = MemoryStore(time.time)
        self.hub = ProgressHub()
        self.is_ready = True
        self.gpu_views: list[GpuView] = []
        self.engine_views: list[EngineView] = []
        self.answers: dict[JobId, HeldAnswer] = {}
        self.requests: dict[JobId, EngineRequest] = {}
        self.left: list[JobId] = []
        self.answered_jobs: list[JobId] = []
        self.results: dict[JobId, RecordedResult] = {}
        self.paused = False
        self._tokens: dict[JobId, Token] = {}
        self._listeners: list[Listener] = []
        self._clients: dict[EngineUrl, EngineClient] = {}
        self._values: dict[tuple[Account, str], bytes] = {}
        self.store.listen(self.tell)

    async def open(self) -> WebContext:
        await self.store.open()
        await self.store.register(NODE, 1, ((GPU, "uuid-0"),), "box")
        return WebContext(
            settings=self.settings,
            jobs=self,
            engines=self,
            values=self,
            data_folder=self.folder,
            new_job_id=lambda: JobId(str(uuid.uuid4())),
        )

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        await self.store.close()

    # --- driven by the test

    async def start(self, job: JobId) -> None:
        """Let an attempt of the job begin."""
        candidate = ClaimCandidate(job=job, engine=EngineUrl("http://127.0.0.1:1"), charge_seconds=1.0)
        claim = ClaimRequest(
            node=NODE,
            boot=1,
            gpu=GPU,
            claim=ClaimId(uuid.uuid4().hex[:16]),
            lease_seconds=60.0,
            candidates=(candidate,),
        )
        reply = await self.store.claim(claim)
        assert reply.code is Code.OK and reply.token is not None
        self._tokens[job] = reply.token
        assert (await self.store.start(job, reply.token)).code is Code.OK

    async def finish(
        self,
        job: JobId,
        *,
        state: JobState = JobState.SUCCEEDED,
        result: RecordedResult | None = None,
        failure: Failure | None = None,
    ) -> None:
        """End the job's attempt, and the job with it."""
        if result is not None:
            self.results[job] = result
        reply = await self.store.finish(
            job, self._tokens[job], state=state, failure=failure, used_seconds=1.0, result=None
        )
        assert reply.code is Code.OK

    def add_engine(
        self, view: EngineView, *, client: EngineClient | None = None, gpu_state: GpuState = GpuState.IDLE
    ) -> None:
        """Let there be one more engine, on a gpu of its own if that is not there yet."""
        self.engine_views.append(view)
        if client is not None:
            self._clients[view.url] = client
        mine = tuple(engine for engine in self.engine_views if engine.gpu == view.gpu)
        kept = [gpu for gpu in self.gpu_views if gpu.id != view.gpu]
        node, _, name = view.gpu.partition("/")
        self.gpu_views = [
            *kept,
            GpuView(
                id=view.gpu,
                name=name,
                node=node,
                uuid="uuid-0",
                state=gpu_state,
                why="",
                job=None,
                engines=mine,
                vram_bytes_total=None,
                vram_bytes_free=None,
                labels=frozenset(),
            ),
        ]

    # --- JobsPort

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        limits = self.settings.limits
        queue = QueueLimits(
            queued_max=limits.queued_max, queued_per_account_max=limits.queued_per_account_max
        )
        reply = await self.store.enqueue(replace(new, body=encode_request(request)), queue)
        match reply.code:
            case Code.OK | Code.EXISTS:
                return reply
            case Code.CONFLICT:
                raise Conflict
            case _:
                raise Throttled("The queue is full.", retry_after_seconds=7.2)

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        answer = HeldAnswer(self.folder, bytes_max=1 << 24)
        self.answers[new.job.id] = answer
        self.requests[new.job.id] = request
        await self.store.enqueue(new, QueueLimits())
        return HeldCall(job=new.job.id, answer=answer)

    def answered(self, job: JobId) -> None:
        self.answered_jobs.append(job)

    def leave(self, job: JobId) -> None:
        self.left.append(job)

    def held_answer(self, job: JobId) -> HeldAnswer | None:
        return self.answers.get(job)

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
        return self.results.get(job)

    async def artifact(self, job: JobId, number: int) -> Path | None:
        path = self.folder / f"{job}-{number}"
        return path if path.exists() else None

    def keep_artifact(self, job: JobId, number: int, data: bytes, about: Artifact) -> Artifact:
        (self.folder / f"{job}-{number}").write_bytes(data)
        return about

    async def forget(self, job: JobId) -> Reply:
        return await self.store.forget(job)

    def place(self, job: JobId) -> Place:
        reason = Reason(code="no_free_gpu", text="Every GPU is busy.", args={"gpus": 1})
        return Place(position=1, reason=reason, estimated_start_seconds=(1.0, 2.0))

    def gpus(self) -> tuple[GpuView, ...]:
        return tuple(self.gpu_views)

    def queue(self) -> QueueView:
        return QueueView(waiting=1, running=0, paused=self.paused, waiting_by_service={Service.COMFYUI: 1})

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        state = GpuState.DRAINING if draining else GpuState.IDLE
        self.gpu_views = [replace(view, state=state) if view.id == gpu else view for view in self.gpu_views]
        return await self.store.drain(gpu, draining)

    async def pause(self, paused: bool) -> Reply:
        self.paused = paused
        return await self.store.pause(paused)

    def listen(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, events: tuple[StoreEvent, ...]) -> None:
        """Let listeners hear events."""
        for listener in tuple(self._listeners):
            listener(events)

    # --- EnginesPort

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return tuple(view for view in self.engine_views if service is None or view.service is service)

    def wire(self, engine: EngineUrl) -> EngineClient:
        return self._clients[engine]

    def sticky(self, service: Service, key: str) -> EngineView | None:
        return next(iter(self.engines(service)), None)

    # --- ValuesPort

    async def account_get(self, account: Account, kind: str) -> bytes | None:
        return self._values.get((account, kind))

    async def account_put(self, account: Account, kind: str, value: bytes) -> None:
        self._values[account, kind] = value

    async def waiting(self) -> list[JobId]:
        """Return the jobs that have not ended, oldest first."""
        records = await self.store.jobs(JobQuery(limit=100))
        return [record.job.id for record in reversed(records) if record.state not in ENDED]
