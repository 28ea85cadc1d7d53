"""Small real parts for the dispatcher in virtual time: cards that judge, engines that misbehave on order, a
store that fails.

The card is the oracle: it knows what computes on it and asks nobody. Engines outlive the gateways started
over them.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from gpulane.core.events import Snapshot
from gpulane.core.model import (
    ClaimId,
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
from gpulane.engine.base import (
    BUSY,
    REFUSED,
    AttemptContext,
    Description,
    Found,
    Outcome,
    ProbeReport,
    RecordedResult,
    Vram,
)
from gpulane.errors import EngineError, StoreError
from gpulane.store.base import (
    Again,
    BeatReply,
    ClaimRequest,
    JobRecord,
    Listener,
    NewJob,
    QueueLimits,
    Reply,
)
from gpulane.store.memory import MemoryStore
from gpulane.store.node import GpuRecord

T = TypeVar("T")


@dataclass(slots=True)
class ScriptedCard:
    """Knows what computes on it."""

    computing: set[str] = field(default_factory=set[str])
    overlaps: list[tuple[float, tuple[str, ...]]] = field(default_factory=list[tuple[float, tuple[str, ...]]])
    computed: list[str] = field(default_factory=list[str])
    memory: dict[str, int] = field(default_factory=dict[str, int])
    """What each engine holds, in bytes."""

    def begin(self, job: str) -> None:
        self.computing.add(job)
        ours = sorted(job for job in self.computing if not job.startswith("stranger"))
        # A canary of a gateway that was killed may still sing; it needs no gpu. Jobs must be alone.
        if len(ours) > 1 and not all(job.startswith("canary") for job in ours):
            self.overlaps.append((asyncio.get_running_loop().time(), tuple(ours)))

    def end(self, job: str, *, well: bool) -> None:
        self.computing.discard(job)
        if well:
            self.computed.append(job)


@dataclass(slots=True)
class Trouble:
    """How likely each thing goes wrong; all at 0 once the faults are over."""

    raises: float = 0.0
    """`run` raises, as a bug of ours would, before or after the job was sent."""
    breaks: float = 0.0
    """The connection breaks: `run` returns without knowing what the engine does."""
    fails: float = 0.0
    loses: float = 0.0
    store: float = 0.0
    """A verb fails, half of the time after it was done."""
    records: float = 0.0


class ScriptedEngine:
    """A ServiceClient and its engine in one: a queue that computes one job after the other on a card."""

    def __init__(
        self,
        url: EngineUrl,
        service: Service,
        card: ScriptedCard,
        chance: random.Random,
        trouble: Trouble,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.card = card
        self.is_up = True
        self.is_silent = False
        self.tells_idle = service is Service.COMFYUI
        self.read_seconds = 0.0
        """How long a request lies in the socket before the engine reads it."""
        self.hold_seconds: float | None = None
        """How long each job takes; None: some seconds."""
        self.stop_seconds = 0.0
        """How long a job that is to stop goes on."""
        self.unload_fault = ""
        """`late`: memory comes free a second after. `lies`: acknowledged, and kept. `hangs`: no answer, and
        carried out a second after. `fails`: an error. `busy`: refused as if something ran."""
        self.unloads = 0
        self.unloaded_at_work: list[tuple[float, str]] = []
        """Unloads that met a job of this engine."""
        self.is_vram_broken = False
        self._url = url
        self._service = service
        self._chance = chance
        self._trouble = trouble
        self._tasks = tasks
        self._queue: dict[str, asyncio.Task[None]] = {}
        self._seen: set[str] = set()
        self._history: dict[str, Found] = {}
        self._turn = asyncio.Lock()
        self._ended = asyncio.Condition()

    @property
    def url(self) -> EngineUrl:
        return self._url

    @property
    def service(self) -> Service:
        return self._service

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    # --- the engine itself

    def accept(self, job: str, seconds: float) -> None:
        self._queue[job] = self._tasks.create_task(self._compute(job, seconds))

    async def die(self) -> None:
        self.is_up = False
        self.card.memory.pop(self._url, None)
        for task in tuple(self._queue.values()):
            task.cancel()
        self._queue.clear()
        self._seen.clear()
        self._history.clear()
        async with self._ended:
            self._ended.notify_all()

    async def _compute(self, job: str, seconds: float) -> None:
        well = False
        is_on_card = False
        try:
            await asyncio.sleep(self.read_seconds)
            self._seen.add(job)
            async with self._turn:
                is_on_card = True
                self.card.begin(job)
                if not job.startswith("canary"):
                    self.card.memory[self._url] = 20 * 1024**3
                await asyncio.sleep(seconds)
                well = True
                self.card.end(job, well=True)
        except asyncio.CancelledError:
            pass
        finally:
            if is_on_card and not well:
                self.card.end(job, well=False)
            if self._queue.pop(job, None) is not None:
                self._history[job] = Found.SUCCEEDED if well else Found.INTERRUPTED
        async with self._ended:
            self._ended.notify_all()

    # --- what the gateway asks

    async def _answer(self) -> None:
        await asyncio.sleep(self._chance.random() * 0.02)
        if not self.is_up:
            refused = EngineError(f"{self._url} refuses connections", sent=False)
            refused.code = REFUSED
            raise refused
        if self.is_silent:
            await asyncio.sleep(2.0)
            error = EngineError(f"{self._url} does not answer")
            error.code = "engine_timeout"
            raise error

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        await self._answer()
        strange = tuple(job for job in self._queue if job in self._seen and job not in own)
        strange = tuple(job for job in strange if not job.startswith("canary"))
        return ProbeReport(idle=not (self._seen & self._queue.keys()), strange_jobs=strange)

    def known_idle(self) -> bool | None:
        if not self.tells_idle or not self.is_up or self.is_silent:
            return None
        return not self._queue

    async def describe(self) -> Description:
        await self._answer()
        return Description(
            service=self._service, flavor="scripted", version="1", offers=None, documents={}, digest="1"
        )

    async def unload(self) -> None:
        await self._answer()
        if self._seen & self._queue.keys() or self.unload_fault == "busy":
            error = EngineError(f"{self._url} is at work", sent=False)
            error.code = BUSY
            raise error
        self.unloads += 1
        match self.unload_fault:
            case "lies":
                pass
            case "late":
                self._tasks.create_task(self._let_go(1.0, matters=False))
            case "hangs":
                self._tasks.create_task(self._let_go(1.0 + self._chance.random() * 4, matters=True))
                await asyncio.sleep(1_000)
            case "fails":
                raise EngineError(f"{self._url} answers 500")
            case _:
                self.card.memory.pop(self._url, None)

    async def _let_go(self, seconds: float, *, matters: bool) -> None:
        """Carry an unload out late. One that nobody was answered must not meet a job sent since."""
        await asyncio.sleep(seconds)
        if not self.is_up:
            return
        if matters and any(
            not job.startswith(("stranger", "canary")) for job in self._seen & self._queue.keys()
        ):
            self.unloaded_at_work.append((asyncio.get_running_loop().time(), self._url))
        self.card.memory.pop(self._url, None)

    async def make_loadable(self) -> None:
        await self._answer()

    async def vram(self) -> Vram:
        if self.is_vram_broken:
            raise RuntimeError("a bug where memory is read")
        await self._answer()
        total = 24 * 1024**3
        return Vram(bytes_free=total - sum(self.card.memory.values()), bytes_total=total)

    async def canary(self) -> bool:
        await self._answer()
        name = f"canary {self._chance.random()}"
        self.accept(name, 0.2)
        await self._over(name)
        return True

    async def run(self, attempt: AttemptContext) -> Outcome:
        job = attempt.job.id
        await asyncio.sleep(self._chance.random() * 0.01)
        if self._strikes(self._trouble.raises / 2):
            raise RuntimeError("a bug before the job was sent")
        if attempt.cancel_wanted.is_set():
            return Outcome(state=JobState.CANCELLED)
        if not self.is_up:
            return _failed(FailureKind.NOT_STARTED, "connect_failed")
        self._history.pop(job, None)
        if self._strikes(self._trouble.loses):
            return _failed(FailureKind.LOST, "lost")
        seconds = self.hold_seconds
        self.accept(job, 0.1 + self._chance.random() * 3 if seconds is None else seconds)
        if self._strikes(self._trouble.breaks):
            await asyncio.sleep(self._chance.random())
            return _failed(FailureKind.LOST, "connection_lost", idle=False)
        if self._strikes(self._trouble.raises / 2):
            raise RuntimeError("a bug while the job runs")
        return await self.follow(attempt)

    async def follow(self, attempt: AttemptContext) -> Outcome:
        job = attempt.job.id
        waiter = asyncio.create_task(attempt.cancel_wanted.wait())
        over = asyncio.create_task(self._over(job))
        try:
            await asyncio.wait({waiter, over}, return_when=asyncio.FIRST_COMPLETED)
            if not over.done():
                self._stop(job)
                await over
        finally:
            waiter.cancel()
            over.cancel()
        if not self.is_up:
            failure = Failure(kind=FailureKind.LOST, code="engine_lost", message="died", killed_engine=False)
            return Outcome(state=JobState.FAILED, failure=failure, engine_idle=False)
        match self._history.get(job):
            case Found.SUCCEEDED if self._strikes(self._trouble.fails):
                return _failed(FailureKind.ENGINE, "out_of_memory")
            case Found.SUCCEEDED:
                if attempt.answer is not None:
                    attempt.answer.begin(200, ())
                    attempt.answer.write(b"picture")
                    attempt.answer.finish()
                    return Outcome(state=JobState.SUCCEEDED, service_seconds=1.0)
                result = RecordedResult(document=msgspec.Raw(b"{}"))
                return Outcome(state=JobState.SUCCEEDED, result=result, service_seconds=1.0)
            case Found.INTERRUPTED:
                return Outcome(state=JobState.CANCELLED)
            case _:
                return _failed(FailureKind.LOST, "engine_restarted")

    async def find(self, job: JobId, *, fresh: bool = True) -> Found:
        await self._answer()
        if job in self._queue and job in self._seen:
            return Found.RUNNING
        return self._history.get(job, Found.ABSENT)

    async def erase(self, job: JobId) -> None:
        await self._answer()
        self._history.pop(job, None)

    async def interrupt(self, job: JobId) -> None:
        await self._answer()
        self._stop(job)

    def _stop(self, job: str) -> None:
        task = self._queue.get(job)
        if task is not None and job in self._seen:
            asyncio.get_running_loop().call_later(self.stop_seconds, task.cancel)

    async def _over(self, job: str) -> None:
        async with self._ended:
            await self._ended.wait_for(lambda: job not in self._queue)

    def _strikes(self, likely: float) -> bool:
        return self._chance.random() < likely


def _failed(kind: FailureKind, code: str, *, idle: bool = True) -> Outcome:
    return Outcome(
        state=JobState.FAILED, failure=Failure(kind=kind, code=code, message=code), engine_idle=idle
    )


class FailingStore(MemoryStore):
    """The real transitions, behind a door that is slow and sometimes breaks, before or after them."""

    def __init__(self, clock: Callable[[], float], chance: random.Random, trouble: Trouble) -> None:
        super().__init__(clock)
        self.asked: list[str] = []
        self._chance = chance
        self._trouble = trouble

    def listen(self, listener: Listener) -> None:
        """A new process: the listener of the one before it is gone."""
        self._listeners[:] = [listener]

    async def _through(self, verb: Callable[[], Awaitable[T]]) -> T:
        await asyncio.sleep(self._chance.random() * 0.01)
        breaks = self._chance.random() < self._trouble.store
        if breaks and self._chance.random() < 0.5:
            raise StoreError("it broke before it was done")
        answer = await verb()
        await asyncio.sleep(self._chance.random() * 0.01)
        if breaks:
            raise StoreError("it broke after it was done")
        return answer

    async def snapshot(self) -> Snapshot:
        return await MemoryStore.snapshot(self)

    async def enqueue(self, new: NewJob, limits: QueueLimits) -> Reply:
        return await self._through(lambda: MemoryStore.enqueue(self, new, limits))

    async def cancel(self, job: JobId, failure: Failure | None = None) -> Reply:
        return await self._through(lambda: MemoryStore.cancel(self, job, failure))

    async def claim(self, request: ClaimRequest) -> Reply:
        self.asked.append("claim")
        return await self._through(lambda: MemoryStore.claim(self, request))

    async def start(self, job: JobId, token: Token) -> Reply:
        return await self._through(lambda: MemoryStore.start(self, job, token))

    async def release(self, job: JobId, token: Token, why: str) -> Reply:
        return await self._through(lambda: MemoryStore.release(self, job, token, why))

    async def finish(
        self,
        job: JobId,
        token: Token,
        *,
        state: JobState,
        failure: Failure | None,
        used_seconds: float,
        result: bytes | None,
    ) -> Reply:
        return await self._through(
            lambda: MemoryStore.finish(
                self, job, token, state=state, failure=failure, used_seconds=used_seconds, result=result
            )
        )

    async def fail(
        self, job: JobId, token: Token, failure: Failure, again: Again, *, used_seconds: float
    ) -> Reply:
        return await self._through(
            lambda: MemoryStore.fail(self, job, token, failure, again, used_seconds=used_seconds)
        )

    async def resume(
        self,
        node: NodeId,
        boot: int,
        gpu: GpuId,
        job: JobId,
        token: Token,
        claim: ClaimId,
        lease_seconds: float,
    ) -> Reply:
        return await self._through(
            lambda: MemoryStore.resume(self, node, boot, gpu, job, token, claim, lease_seconds)
        )

    async def beat(
        self,
        node: NodeId,
        boot: int,
        seen_seconds: float,
        lease_seconds: float,
        leases: tuple[tuple[JobId, Token], ...],
    ) -> BeatReply:
        return await self._through(
            lambda: MemoryStore.beat(self, node, boot, seen_seconds, lease_seconds, leases)
        )

    async def job(self, job: JobId) -> JobRecord | None:
        return await self._through(lambda: MemoryStore.job(self, job))

    async def body(self, job: JobId) -> bytes | None:
        return await self._through(lambda: MemoryStore.body(self, job))


class MemoryRecords:
    """What a node keeps for itself, in memory: it outlives the gateways of a test."""

    def __init__(self, chance: random.Random, trouble: Trouble) -> None:
        self.records: dict[GpuId, GpuRecord] = {}
        self.values: dict[tuple[str, str], bytes] = {}
        self._chance = chance
        self._trouble = trouble

    async def put_gpu_record(self, *records: GpuRecord) -> None:
        self._break()
        self.records.update({record.gpu: record for record in records})
        await self._fsync()

    async def drop_gpu_record(self, gpu: GpuId, token: Token) -> None:
        self._break()
        if gpu in self.records and self.records[gpu].token == token:
            del self.records[gpu]
        await self._fsync()

    async def gpu_records(self) -> tuple[GpuRecord, ...]:
        return tuple(self.records.values())

    def learn_put(self, kind: str, key: str, value: bytes) -> None:
        self.values[kind, key] = value

    async def learned(self, kind: str) -> dict[str, bytes]:
        return {key: value for (of, key), value in self.values.items() if of == kind}

    def _break(self) -> None:
        if self._chance.random() < self._trouble.records:
            raise StoreError("the disk is full")

    async def _fsync(self) -> None:
        """Slow, but in order, as the one writer of the real one is."""
        await asyncio.sleep(self._chance.random() * 0.005)
