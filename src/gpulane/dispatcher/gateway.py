"""The running gateway of this node: builds the book from the store, owns the gpus, takes jobs, and shows
itself.

Implements what the web asks for (jobs, engines). It starts and stops everything below it in order, and
answers every question
from the book or the store; it decides nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from gpulane.adapters.base import EngineRequest, decode_request, encode_request
from gpulane.config import Settings
from gpulane.core.admission import Refused, admit
from gpulane.core.book import Book
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    AttemptFailed,
    CancelWanted,
    GpuAdded,
    HolderAway,
    JobEnded,
    JobStarted,
    StoreEvent,
)
from gpulane.core.model import (
    Account,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    FailureKind,
    Gpu,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Service,
)
from gpulane.core.policy import Policy
from gpulane.dispatcher.gpu import GpuOwner, NodeLease, Payload
from gpulane.dispatcher.held import Held, HeldCalls
from gpulane.dispatcher.leases import LEASE_SECONDS, Leases
from gpulane.dispatcher.loop import Loop
from gpulane.dispatcher.recovery import Recovery
from gpulane.dispatcher.results import ArtifactFolder, decode_result
from gpulane.dispatcher.shown import Shown
from gpulane.engine.base import RecordedResult, ServiceClient
from gpulane.engine.probe import EngineWatch
from gpulane.engine.progress import ProgressHub
from gpulane.errors import Conflict, GpulaneError, Impossible, StoreError, Throttled, Unavailable
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import (
    Code,
    JobQuery,
    JobRecord,
    Listener,
    NewJob,
    QueueLimits,
    Reply,
    Retention,
    Store,
)
from gpulane.store.node import NodeStore
from gpulane.views import EngineView, GpuView, HeldCall, Place, QueueView
from gpulane.wire.client import EngineClient

RECENT_BODIES_BYTES_MAX: Final = 64 * 1024**2
"""Bodies of jobs submitted here stay in memory until claimed, up to this much: they need not be read back."""
UNCOPIED_LOOK_BACK: Final = 200
"""How many of the last ended jobs are looked through for uncopied files after a restart."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayParts:
    """What `service` builds a gateway from."""

    settings: Settings
    policy: Policy
    store: Store
    node_store: NodeStore
    node: NodeId
    boot: int
    gpus: tuple[Gpu, ...]
    clients: Mapping[EngineUrl, ServiceClient]
    wires: Mapping[EngineUrl, EngineClient]
    data_folder: Path
    clock: Callable[[], float]
    """Monotonic seconds."""
    wall: Callable[[], float]
    """Seconds since 1970, for records that people read."""
    new_claim: Callable[[], ClaimId]


class JobFailed(GpulaneError):
    """The job failed."""

    code = "job_failed"


class Gateway:
    """One per process."""

    def __init__(self, parts: GatewayParts) -> None:
        settings = parts.settings
        self._parts = parts
        self._store = parts.store
        self.hub = ProgressHub()
        self._book = Book(parts.policy)
        self._loop = Loop(self._book, parts.policy, parts.clock, self._carry_out)
        self._lease = NodeLease(node=parts.node, boot=parts.boot, lease_seconds=LEASE_SECONDS)
        self._held = HeldCalls(settings.hold, on_away=self._holder_away, on_given_up=self._give_up)
        self._recent: dict[JobId, Payload] = {}
        self._recent_bytes = 0
        self._limits = QueueLimits(
            queued_max=settings.limits.queued_max,
            queued_per_account_max=settings.limits.queued_per_account_max,
        )
        self._artifacts = ArtifactFolder(parts.data_folder / "artifacts", parts.wires)
        self._tasks: asyncio.TaskGroup | None = None
        self._owners = {gpu.id: self._owner(gpu) for gpu in parts.gpus}
        self._shown = Shown(self._book, self._owners, parts.clock)
        self._spool = parts.data_folder / "spool"
        self._accepting = False
        self._book_is_ready = False
        self._attempts: set[asyncio.Task[None]] = set()

    # --- life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold everything under way inside the block; leaving it stops at once (drain first, for a quiet
        end).
        """
        self._spool.mkdir(parents=True, exist_ok=True)
        await self._begin_book()
        work = await self._background()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            background = [tasks.create_task(coroutine) for coroutine in work]
            self._loop.start()
            self._accepting = True
            try:
                yield
            finally:
                self._accepting = False
                self._loop.stop()
                self._held.close()
                for task in background:
                    task.cancel()
                for task in tuple(self._attempts):
                    task.cancel()
        for client in self._parts.clients.values():
            await client.close()

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        """Let a gpu take nothing new, or take work again."""
        return await self._store.drain(gpu, draining)

    async def quiet_end(self) -> None:
        """Take no new job, start none, and wait until what runs has ended."""
        self._accepting = False
        self._loop.stop()
        while any(owner.running is not None for owner in self._owners.values()):
            await asyncio.sleep(0.05)

    @property
    def is_ready(self) -> bool:
        return self._accepting

    async def _begin_book(self) -> None:
        self._store.listen(self._hear)
        uuids = tuple((gpu.id, gpu.uuid) for gpu in self._parts.gpus)
        reply = await self._store.register(
            self._parts.node, self._parts.boot, uuids, self._parts.settings.name or ""
        )
        if reply.code is not Code.OK:
            raise StoreError(f"this node cannot register: {reply.code}")
        gone = Failure(kind=FailureKind.LOST, code="client_gone", message="its client was lost in a restart")
        for job in reply.held_waiting:
            await self._store.cancel(job, gone)
        for job, token in reply.claims:
            await self._store.release(job, token, "restart")
        self._book.restore(await self._store.snapshot(), self._parts.clock())
        for gpu in self._parts.gpus:
            self._loop.tell(GpuAdded(gpu=gpu))
        self._book_is_ready = True

    async def _background(self) -> list[Coroutine[object, object, None]]:
        leases = Leases(
            self._store,
            self._lease,
            self._owners.values(),
            retention=self._retention(),
            on_pruned=self._artifacts.drop,
            new_claim=self._parts.new_claim,
        )
        self._leases = leases
        watches = [watch.run() for owner in self._owners.values() for watch in owner.watches.values()]
        return [*watches, leases.run(), leases.prune(), *await self._recoveries(), self._copy_uncopied()]

    async def _recoveries(self) -> list[Coroutine[object, object, None]]:
        """One for each gpu whose earlier work may still be under way; the gpus are occupied before anything
        is decided.
        """
        recovery = Recovery(
            store=self._store,
            node_store=self._parts.node_store,
            lease=self._lease,
            payloads=self,
            hub=self.hub,
            quiet_seconds=self._parts.settings.probe.quiet_seconds,
            new_claim=self._parts.new_claim,
            clock=self._parts.clock,
            wall=self._parts.wall,
        )
        found: list[Coroutine[object, object, None]] = []
        attempts = {active.gpu: active for active in (await self._store.snapshot()).active if active.started}
        records = {record.gpu: record for record in await self._parts.node_store.gpu_records()}
        for owner in self._owners.values():
            active, record = attempts.get(owner.id), records.get(owner.id)
            if active is not None:
                job = await self._store.job(active.job.id)
                client = self._parts.clients.get(job.engine) if job is not None and job.engine else None
                if job is not None and client is not None:
                    owner.occupy("recovering", "looking for the job that ran before the restart")
                    found.append(recovery.settle_attempt(owner, client, job, active.token))
                    continue
                # The engine is no longer in the settings: nobody can follow its job any more.
                found.append(self._lose(active.job.id))
            if record is not None and record.engine in self._parts.clients:
                owner.occupy("recovering", "waiting until the engine is known idle after the restart")
                found.append(recovery.settle_record(owner, self._parts.clients[record.engine], record))
        return found

    async def _lose(self, job: JobId) -> None:
        record = await self._store.job(job)
        if record is not None and record.token is not None:
            failure = Failure(
                kind=FailureKind.LOST, code="lost", message="its engine is no longer in the settings"
            )
            await self._store.finish(
                job, record.token, state=JobState.FAILED, failure=failure, used_seconds=0.0, result=None
            )

    async def _copy_uncopied(self) -> None:
        """Copy files of results that a crash left on their engines."""
        ended = frozenset({JobState.SUCCEEDED})
        for record in await self._store.jobs(JobQuery(states=ended, limit=UNCOPIED_LOOK_BACK)):
            result = None if record.job.held else await self.result(record.job.id)
            if result is not None:
                await self._artifacts.copy(record.job.id, result)

    def _owner(self, gpu: Gpu) -> GpuOwner:
        owner = GpuOwner(
            gpu,
            lease=self._lease,
            store=self._store,
            node_store=self._parts.node_store,
            clients=self._parts.clients,
            payloads=self,
            hub=self.hub,
            tell=self._loop.tell,
            spawn=self._spawn,
            book=self._book,
            policy=self._parts.policy,
            on_result=self._copy_files,
            new_claim=self._parts.new_claim,
            clock=self._parts.clock,
            wall=self._parts.wall,
        )
        for engine in gpu.engines:
            owner.watches[engine.url] = self._watch(owner, engine.url)
        return owner

    def _watch(self, owner: GpuOwner, url: EngineUrl) -> EngineWatch:
        def on_stranger(seen: bool) -> None:
            if seen:
                owner.occupy(f"stranger {url}", f"somebody else's work runs on {url}")
            else:
                owner.free(f"stranger {url}")

        return EngineWatch(
            self._parts.clients[url],
            owner.id,
            self._parts.settings.probe,
            own_jobs=owner.own_jobs,
            occupancy=lambda: owner.occupancy,
            tell=self._loop.tell,
            on_stranger=on_stranger,
            clock=self._parts.clock,
        )

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        assert self._tasks is not None, "nothing is started before the gateway runs"
        task = self._tasks.create_task(coroutine)
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)

    def _retention(self) -> Retention:
        kept = self._parts.settings.retention
        return Retention(
            ended_seconds=kept.ended_days * 86_400.0,
            ended_jobs_max=kept.ended_jobs_max,
            result_bytes_max=int(kept.result_gib * 1024**3),
        )

    # --- the loop's two ends

    def _carry_out(self, decision: StartAttempt) -> bool:
        owner = self._owners.get(decision.gpu)
        return owner is not None and owner.begin(decision)

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        if not self._book_is_ready:
            return
        self._loop.hear(events)
        for event in events:
            self._after(event)

    def _after(self, event: StoreEvent) -> None:
        """What this node owes to its own clients and gpus because of a fact."""
        match event:
            case JobStarted():
                self._held.started(event.job)
                self._forget_recent(event.job)
            case AttemptFailed():
                self._held.waits_again(event.job)
            case CancelWanted():
                for owner in self._owners.values():
                    owner.cancel(event.job)
            case JobEnded():
                self._forget_recent(event.job)
                self._end_held(event)
            case _:
                pass

    def _end_held(self, event: JobEnded) -> None:
        held = self._held.get(event.job)
        if held is None:
            return
        if not held.answer.is_ended:
            held.answer.fail(_why_no_answer(event))
        self._held.over(event.job)

    def _copy_files(self, job: JobId, result: RecordedResult) -> None:
        """Copy the files of a result, beside the gpu's next job."""
        self._spawn(self._artifacts.copy(job, result))

    # --- JobsPort: submitting

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        """Admit and store a job; durable on return."""
        self._check_accepting()
        known = await self._known(new)
        if known is not None:
            return known
        self._admit(new)
        stored = replace(new, body=encode_request(request))
        self._remember(new, request)
        reply = await self._store.enqueue(stored, self._limits)
        if reply.code is not Code.OK:
            self._forget_recent(new.job.id)
        return self._judged(reply)

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        """Admit a job whose client waits; an identical call whose client left is joined."""
        self._check_accepting()
        joined = self._held.join(new.job.account, new.job.service, new.digest)
        if joined is not None:
            return HeldCall(job=joined.job.id, answer=joined.answer, joined=True)
        if len(self._held) >= self._parts.settings.limits.held_max:
            raise Throttled("too many requests wait for their answer already", retry_after_seconds=10)
        self._admit(new)
        limits = self._parts.settings.limits
        answer = HeldAnswer(
            self._spool,
            bytes_max=int(limits.answer_mib * 1024**2),
            memory_bytes_max=int(limits.answer_memory_mib * 1024**2),
        )
        job = replace(new.job, held=True, holder=f"{self._parts.node}.{self._parts.boot}")
        held = Held(job=job, request=request, meta=new.meta, answer=answer, digest=new.digest)
        self._held.add(held)
        try:
            self._judged(await self._store.enqueue(replace(new, job=job), self._limits))
        except GpulaneError:
            self._held.drop(job.id)
            raise
        return HeldCall(job=job.id, answer=answer)

    def answered(self, job: JobId) -> None:
        self._held.done(job)

    def leave(self, job: JobId) -> None:
        self._held.leave(job)

    def held_answer(self, job: JobId) -> HeldAnswer | None:
        held = self._held.get(job)
        return None if held is None else held.answer

    async def cancel(self, job: JobId) -> Reply:
        return await self._store.cancel(job)

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply:
        return await self._store.prioritise(job, band, priority)

    # --- JobsPort: reading

    async def record(self, job: JobId) -> JobRecord | None:
        return await self._store.job(job)

    async def record_of_client(
        self, account: Account, service: Service, client_job_id: str
    ) -> JobRecord | None:
        return await self._store.job_of_client(account, service, client_job_id)

    async def records(self, query: JobQuery) -> tuple[JobRecord, ...]:
        return await self._store.jobs(query)

    async def body(self, job: JobId) -> bytes | None:
        """The body that was or will be sent to the engine."""
        stored = await self._store.body(job)
        return None if stored is None else decode_request(stored).body

    async def result(self, job: JobId) -> RecordedResult | None:
        stored = await self._store.result(job)
        return None if stored is None else decode_result(stored)

    async def artifact(self, job: JobId, number: int) -> Path | None:
        return self._artifacts.find(job, number)

    async def forget(self, job: JobId) -> Reply:
        reply = await self._store.forget(job)
        if reply.code is Code.OK:
            self._artifacts.drop(job)
        return reply

    def place(self, job: JobId) -> Place:
        return self._shown.place(job)

    def gpus(self) -> tuple[GpuView, ...]:
        return self._shown.gpus()

    def queue(self) -> QueueView:
        return self._shown.queue()

    async def pause(self, paused: bool) -> Reply:
        return await self._store.pause(paused)

    def listen(self, listener: Listener) -> Callable[[], None]:
        return self._loop.listen(listener)

    # --- EnginesPort

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return self._shown.engines(service)

    def wire(self, engine: EngineUrl) -> EngineClient:
        return self._parts.wires[engine]

    def sticky(self, service: Service, key: str) -> EngineView | None:
        return self._shown.sticky(service, key)

    # --- Payloads

    async def payload(self, record: JobRecord) -> Payload | None:
        """What a claimed job sends, and where its answer goes."""
        held = self._held.get(record.job.id)
        if held is not None:
            return Payload(request=held.request, meta=held.meta, answer=held.answer)
        if record.job.held:
            return None
        recent = self._recent.get(record.job.id)
        if recent is not None:
            return recent
        stored = await self._store.body(record.job.id)
        if stored is None:
            return None
        return Payload(request=decode_request(stored), meta=record.meta, answer=None)

    # --- inside

    def _check_accepting(self) -> None:
        if not self._accepting:
            raise Unavailable("gpulane is stopping and takes no new jobs", retry_after_seconds=5)

    async def _known(self, new: NewJob) -> Reply | None:
        """A repeated submission is answered as the first, even when it could not be admitted now."""
        if new.client_job_id is None and new.idempotency_key is None:
            return None
        if new.client_job_id is not None:
            record = await self._store.job_of_client(new.job.account, new.job.service, new.client_job_id)
            if record is not None:
                # The store compares the content; admission would only be in the way.
                return self._judged(await self._store.enqueue(new, self._limits))
        return None

    def _admit(self, new: NewJob) -> None:
        answer = admit(self._book, new.job)
        if not isinstance(answer, Refused):
            return
        reason = answer.reason
        hint = "; ".join(each.text for each in answer.per_gpu) or None
        if reason.code in {"queue_full", "account_full"}:
            raise Throttled(reason.text, hint=hint, code=reason.code, retry_after_seconds=5)
        for owner in self._owners.values():
            for watch in owner.watches.values():
                # What is refused now may have been put on the engine's disk a moment ago.
                if watch.client.service is new.job.service:
                    watch.describe_soon()
        raise Impossible(reason.text, hint=hint, code=reason.code)

    def _judged(self, reply: Reply) -> Reply:
        match reply.code:
            case Code.OK | Code.EXISTS:
                return reply
            case Code.CONFLICT:
                raise Conflict("this id was used before with other content; take a new one")
            case Code.FULL:
                raise Throttled("the queue is full", retry_after_seconds=30)
            case Code.ACCOUNT_FULL:
                raise Throttled("you have too many jobs waiting", code="account_full", retry_after_seconds=30)
            case _:
                raise StoreError(f"enqueue was answered {reply.code}")

    def _remember(self, new: NewJob, request: EngineRequest) -> None:
        self._recent[new.job.id] = Payload(request=request, meta=new.meta, answer=None)
        self._recent_bytes += len(request.body)
        while self._recent_bytes > RECENT_BODIES_BYTES_MAX:
            self._forget_recent(next(iter(self._recent)))

    def _forget_recent(self, job: JobId) -> None:
        payload = self._recent.pop(job, None)
        if payload is not None:
            self._recent_bytes -= len(payload.request.body)

    def _holder_away(self, job: JobId, away: bool) -> None:
        self._loop.tell(HolderAway(job=job, away=away))

    def _give_up(self, job: JobId) -> None:
        gone = Failure(
            kind=FailureKind.CLIENT, code="client_gone", message="its client left and did not come back"
        )
        self._spawn(self._cancel_quietly(job, gone))

    async def _cancel_quietly(self, job: JobId, failure: Failure) -> None:
        try:
            await self._store.cancel(job, failure)
        except StoreError as error:
            _log.error("cancel_failed", job=job, why=error.message)


def _why_no_answer(event: JobEnded) -> GpulaneError:
    if event.failure is not None:
        error = JobFailed(event.failure.message)
        error.code = event.failure.code
        return error
    error = JobFailed("the job was cancelled")
    error.code = "cancelled"
    return error
