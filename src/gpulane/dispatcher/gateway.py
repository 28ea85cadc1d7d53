"""The running gateway of this node: starts and stops everything below it in order, and is what the web asks.

Every question is answered from the book, the store or one of its parts; it decides nothing itself. A fault
in one part's task is logged there and ends neither the others nor the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from gpulane.adapters.base import EngineRequest, decode_request
from gpulane.config import EngineSettings, Settings
from gpulane.core.book import Book
from gpulane.core.breaker import BreakerLimits
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    AttemptFailed,
    CancelWanted,
    GpuAdded,
    GpuDrained,
    HolderAway,
    JobEnded,
    JobReleased,
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
from gpulane.core.watchdog import Patience
from gpulane.dispatcher.cardlock import CardLock
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.dispatcher.handoff import Handoff, HandoffParts
from gpulane.dispatcher.held import HeldCalls
from gpulane.dispatcher.idle import look_at_leaks, unload_when_idle
from gpulane.dispatcher.insist import insist
from gpulane.dispatcher.intake import Intake
from gpulane.dispatcher.learning import Learning
from gpulane.dispatcher.leases import LEASE_SECONDS, Leases
from gpulane.dispatcher.loop import Loop
from gpulane.dispatcher.ports import GpuParts, NodeLease, NodeRecords
from gpulane.dispatcher.readings import Readings
from gpulane.dispatcher.recovery import Recovery
from gpulane.dispatcher.results import ArtifactFolder, decode_result
from gpulane.dispatcher.shown import Shown
from gpulane.dispatcher.supervision import Supervision
from gpulane.engine.base import RecordedResult, ServiceClient
from gpulane.engine.probe import EngineWatch
from gpulane.engine.progress import ProgressHub
from gpulane.engine.telemetry import Telemetry
from gpulane.errors import GpulaneError, StoreError, Unavailable
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import Code, JobQuery, JobRecord, Listener, NewJob, Reply, Retention, Store
from gpulane.views import EngineView, GpuView, HeldCall, Place, QueueView
from gpulane.wire.client import EngineClient

QUIET_POLL_SECONDS: Final = 0.05
RESTORE_REST_SECONDS: Final = 0.05
UNCOPIED_LOOK_BACK: Final = 200
"""How many of the last ended jobs are looked through for uncopied files after a restart."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayParts:
    """What `service` builds a gateway from."""

    settings: Settings
    policy: Policy
    store: Store
    node_store: NodeRecords
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
    client_for: Callable[[EngineUrl, Service], ServiceClient] | None = None
    """Makes a client of an engine that is not in the settings any more, but may still occupy its card."""
    chance: random.Random = field(default_factory=random.Random)
    """For jitter."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    """The driver's word about cards; tells nothing where there is no driver."""
    card_locks: Mapping[GpuId, CardLock] = field(default_factory=dict[GpuId, CardLock])
    """The lock files with which other programs take part."""


class JobFailed(GpulaneError):
    """The job failed."""

    code = "job_failed"


class Gateway:
    """One per process."""

    def __init__(self, parts: GatewayParts) -> None:
        self._parts = parts
        self._store = parts.store
        self.hub = ProgressHub()
        self._book = Book(parts.policy)
        self._loop = Loop(
            self._book, parts.policy, parts.clock, self._carry_out, on_broken=self._restore_book_soon
        )
        self._lease = NodeLease(node=parts.node, boot=parts.boot, lease_seconds=LEASE_SECONDS)
        self._held = HeldCalls(parts.settings.hold, on_away=self._holder_away, on_given_up=self._give_up)
        self._spool = parts.data_folder / "spool"
        self._intake = Intake(
            settings=parts.settings,
            store=parts.store,
            book=self._book,
            held=self._held,
            spool=self._spool,
            holder=f"{parts.node}.{parts.boot}",
            describe_soon=self._describe_soon,
        )
        self._artifacts = ArtifactFolder(parts.data_folder / "artifacts", parts.wires)
        self._learning = Learning(self._book.learned, parts.node_store)
        self._tasks: asyncio.TaskGroup | None = None
        self._gpu_parts = self._shared_parts()
        self._owners = {gpu.id: self._owner(gpu) for gpu in parts.gpus}
        self.supervision = Supervision(
            parts.settings,
            self._owners,
            data_folder=parts.data_folder,
            clock=parts.clock,
            wall=parts.wall,
        )
        handoff = self._handoff_parts()
        for owner in self._owners.values():
            owner.handoff = Handoff(owner.gpu, handoff)
        self._readings = Readings(parts.telemetry, parts.gpus)
        self._shown = Shown(self._book, self._owners, parts.clock, self._readings)
        self._book_is_ready = False
        self._is_over = False
        self._spawned: set[asyncio.Task[None]] = set()

    # --- life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold everything under way inside the block; leaving it stops at once (drain first, for a quiet
        end). Raises StoreError when it cannot begin.
        """
        self._spool.mkdir(parents=True, exist_ok=True)
        await self._begin_book()
        # Gpus with earlier work are occupied here, before anything may be decided.
        quiet_seconds = self._parts.settings.probe.quiet_seconds
        recovery = Recovery(
            self._gpu_parts,
            self._owners,
            quiet_seconds=quiet_seconds,
            client_for=self._parts.client_for,
        )
        earlier = await recovery.begin()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._begin_work(earlier)
                try:
                    yield
                finally:
                    self._end_work()
        finally:
            self._tasks = None
            self._learning.keep()
            await self.supervision.stop()
            for client in self._parts.clients.values():
                await client.close()

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        """Let a gpu take nothing new, or take work again."""
        return await self._store.drain(gpu, draining)

    async def quiet_end(self) -> None:
        """Take no new job, start none, and wait until what runs has ended and is recorded.

        Calls that wait are told at once; when this is cancelled, so are those that run.
        """
        self._stop_beginning()
        self._refuse_calls(waiting_only=True)
        try:
            while any(not owner.is_quiet for owner in self._owners.values()):  # noqa: ASYNC110  three lines, once
                await asyncio.sleep(QUIET_POLL_SECONDS)
        finally:
            self._refuse_calls(waiting_only=False)

    @property
    def is_ready(self) -> bool:
        return self._intake.is_open

    def _begin_work(self, earlier: Iterable[Coroutine[object, object, None]]) -> None:
        for coroutine in earlier:
            self._spawn(coroutine)
        leases = Leases(
            self._store,
            self._lease,
            self._owners.values(),
            retention=self._retention(),
            on_pruned=lambda jobs: self._artifacts.drop(*jobs),
            chance=self._parts.chance,
        )
        for coroutine in self.supervision.begin():
            self._spawn(coroutine)
        self._spawn(self._readings.run())
        idle_seconds = self._parts.settings.handoff.idle_unload_seconds
        for owner in self._owners.values():
            for watch in owner.watches.values():
                self._spawn(watch.run())
            if self._parts.settings.handoff.when_leaking == "skip":
                self._spawn(look_at_leaks(owner))
            if idle_seconds is not None:
                self._spawn(unload_when_idle(owner, self._book, idle_seconds, self._parts.clock))
        for coroutine in (leases.run(), leases.prune(), self._learning.run(), self._copy_uncopied()):
            self._spawn(coroutine)
        self._loop.start()
        self._intake.is_open = True

    def _end_work(self) -> None:
        self._stop_beginning()
        self._refuse_calls(waiting_only=False)
        self._held.close()
        self._is_over = True
        for task in tuple(self._spawned):
            task.cancel()

    def _stop_beginning(self) -> None:
        self._intake.is_open = False
        self._loop.stop()
        for owner in self._owners.values():
            owner.is_stopping = True

    def _refuse_calls(self, *, waiting_only: bool) -> None:
        """Answer the calls that will not be served any more; their clients ask again, somebody else or
        later.
        """
        for held in self._held:
            if not (held.is_over or held.answer.is_ended or (waiting_only and held.is_running)):
                held.answer.fail(Unavailable("gpulane is stopping; ask again", retry_after_seconds=5))

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
        await self._learning.recall()
        self._book.restore(await self._store.snapshot(), self._parts.clock())
        for gpu in self._parts.gpus:
            self._loop.tell(GpuAdded(gpu=gpu))
        self._book_is_ready = True

    def _restore_book_soon(self) -> None:
        self._spawn(self._restore_book())

    async def _restore_book(self) -> None:
        """The book missed an event, or could not take one: what the store knows rules."""
        await asyncio.sleep(RESTORE_REST_SECONDS)  # a fault that comes again must not become a busy loop
        self._loop.restore(await insist(self._store.snapshot, "a snapshot"))
        for job in self._held.away():
            self._holder_away(job, True)

    async def _copy_uncopied(self) -> None:
        """Copy files of results that a crash left on their engines."""
        query = JobQuery(states=frozenset({JobState.SUCCEEDED}), limit=UNCOPIED_LOOK_BACK)
        for record in await insist(lambda: self._store.jobs(query), "ended jobs"):
            result = None if record.job.held else await self.result(record.job.id)
            if result is not None:
                await self._artifacts.copy(record.job.id, result)

    def _shared_parts(self) -> GpuParts:
        parts = self._parts
        return GpuParts(
            lease=self._lease,
            store=parts.store,
            records=parts.node_store,
            clients=parts.clients,
            payloads=self._intake,
            hub=self.hub,
            tell=self._loop.tell,
            spawn=self._spawn,
            book=self._book,
            policy=parts.policy,
            on_result=self._copy_files,
            new_claim=parts.new_claim,
            clock=parts.clock,
            wall=parts.wall,
            chance=parts.chance,
            patience=Patience(
                hung_factor=parts.settings.health.hung_factor,
                hung_seconds_min=parts.settings.health.hung_seconds_min,
                hung_interrupt_seconds=parts.settings.health.hung_interrupt_seconds,
            ),
            breaker_limits=BreakerLimits(
                failures_pause=parts.settings.health.failures_pause,
                pause_seconds=parts.settings.health.pause_seconds,
                pause_seconds_max=parts.settings.health.pause_seconds_max,
            ),
        )

    def _owner(self, gpu: Gpu) -> GpuOwner:
        owner = GpuOwner(gpu, self._gpu_parts)
        for engine in gpu.engines:
            owner.watches[engine.url] = self._watch(owner, engine.url)
        owner.card_lock = self._parts.card_locks.get(gpu.id)
        return owner

    def _handoff_parts(self) -> HandoffParts:
        engines = (engine for gpu in self._parts.settings.gpus.values() for engine in gpu.engines)
        stoppable = (e.url for e in engines if isinstance(e, EngineSettings) and e.stop_to_unload)
        return HandoffParts(
            book=self._book,
            clients=self._parts.clients,
            settings=self._parts.settings.handoff,
            telemetry=self._parts.telemetry,
            restarts=self.supervision,
            stoppable=frozenset(EngineUrl(url) for url in stoppable),
            tell=self._loop.tell,
            clock=self._parts.clock,
        )

    def _watch(self, owner: GpuOwner, url: EngineUrl) -> EngineWatch:
        def on_stranger(seen: bool) -> None:
            if seen:
                report, is_lock = owner.watches[url].report, self._parts.clients[url].service is Service.LOCK
                held_by = report.strange_jobs if report is not None and is_lock else ()
                owner.occupy(f"stranger {url}", next(iter(held_by), f"somebody else's work runs on {url}"))
            else:
                owner.free(f"stranger {url}")

        return EngineWatch(
            self._parts.clients[url],
            owner.id,
            self._parts.settings.probe,
            own_jobs=owner.own_jobs,
            occupancy=lambda: owner.occupancy,
            take_card=lambda: owner.take_for(f"canary {url}", f"trying whether {url} computes"),
            give_card=lambda: owner.free(f"canary {url}"),
            tell=self._loop.tell,
            on_stranger=on_stranger,
            clock=self._parts.clock,
        )

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run beside everything else; a fault in it ends nothing but itself."""
        if self._tasks is None or self._is_over:
            coroutine.close()  # of a gateway that has stopped, or whose tasks have all been cancelled
            return
        task = self._tasks.create_task(_alone(coroutine))
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        task.add_done_callback(lambda _: coroutine.close())  # cancelled before its first step

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
            try:
                self._after(event)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("event_not_followed", told=type(event).__name__)

    def _after(self, event: StoreEvent) -> None:
        """What this node owes to its own clients and gpus because of a fact."""
        match event:
            case JobStarted():
                self._held.started(event.job)
                self._intake.forget(event.job)
            case AttemptFailed() | JobReleased():
                self._held.waits_again(event.job)
            case GpuDrained(draining=False):
                # An operator's `resume` ends a pause as well.
                if (resumed := self._owners.get(event.gpu)) is not None:
                    resumed.forgive()
            case CancelWanted():
                for owner in self._owners.values():
                    owner.cancel(event.job)
            case JobEnded():
                for owner in self._owners.values():
                    owner.over_unsent(event.job)
                self._intake.forget(event.job)
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

    def _describe_soon(self, service: Service) -> None:
        for owner in self._owners.values():
            for watch in owner.watches.values():
                if watch.client.service is service:
                    watch.describe_soon()

    def _holder_away(self, job: JobId, away: bool) -> None:
        self._loop.tell(HolderAway(job=job, away=away))

    def _give_up(self, job: JobId) -> None:
        gone = Failure(
            kind=FailureKind.CLIENT, code="client_gone", message="its client left and did not come back"
        )
        self._spawn(self._cancel_for(job, gone))

    async def _cancel_for(self, job: JobId, failure: Failure) -> None:
        await insist(lambda: self._store.cancel(job, failure), "the cancel of a call that nobody waits for")

    # --- JobsPort: submitting

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        return await self._intake.submit(new, request)

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        return await self._intake.hold(new, request)

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


async def _alone(coroutine: Coroutine[object, object, None]) -> None:
    try:
        await coroutine
    except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
        _log.exception("task_broke", task=coroutine.__name__)


def _why_no_answer(event: JobEnded) -> GpulaneError:
    if event.failure is not None:
        error = JobFailed(event.failure.message)
        error.code = event.failure.code
        return error
    error = JobFailed("the job was cancelled")
    error.code = "cancelled"
    return error
