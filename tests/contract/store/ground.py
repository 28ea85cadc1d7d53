"""What the store's tests stand on: a clock in the hand, jobs out of nothing, a store brought to a state."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from gpulane.core.events import StoreEvent
from gpulane.core.model import (
    Account,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Service,
    Token,
)
from gpulane.store.base import (
    Again,
    ClaimCandidate,
    ClaimRequest,
    Code,
    JobRecord,
    NewJob,
    QueueLimits,
    Reply,
    Store,
)

NODE = NodeId("n1")
GPU = GpuId("box/gpu0")
GPU2 = GpuId("box/gpu1")
ENGINE = EngineUrl("http://127.0.0.1:7860")
ANN = Account("ann")
BOB = Account("bob")
LEASE = 30.0
CHARGE = 10.0
NO_TOKEN = Token("0.none")
BROKEN = Failure(kind=FailureKind.ENGINE, code="out_of_memory", message="CUDA out of memory")
AGAIN = Again(rest_seconds=0.0, avoid=frozenset({GPU}), refund=False)
LIMITS = QueueLimits()


@dataclass
class Clock:
    """Wall seconds that pass when told."""

    now: float = 1_750_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


def new_job(number: int, account: Account = ANN, **more: object) -> Job:
    fields: dict[str, object] = {
        "id": JobId(f"00000000-0000-4000-8000-{number:012d}"),
        "account": account,
        "service": Service.COMFYUI,
        "kind": "prompt",
    } | more
    return Job(**fields)  # pyright: ignore[reportArgumentType]  # fields by name, for brevity in tests


@dataclass
class Ground:
    """A store, its clock and everything it told."""

    store: Store
    clock: Clock
    folder: Path | None = None
    """Where it keeps its data; None where nothing is durable."""
    events: list[StoreEvent] = field(default_factory=list[StoreEvent])
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def open(self) -> None:
        await self.store.open()
        self.store.listen(self.events.extend)
        await self.store.register(NODE, 1, ((GPU, "uuid-0"), (GPU2, "uuid-1")), "box")

    async def enqueue(self, account: Account = ANN, *, body: bytes | None = b"{}", **more: object) -> JobId:
        job = new_job(next(self.numbers), account, **more)
        reply = await self.store.enqueue(NewJob(job=job, body=body, digest="d1"), LIMITS)
        assert reply.code is Code.OK
        return job.id

    async def claim(self, *jobs: JobId, gpu: GpuId = GPU, claim: str | None = None) -> Reply:
        return await self.store.claim(claim_request(*jobs, gpu=gpu, claim=claim or f"c{next(self.numbers)}"))

    async def claimed(self, job: JobId, gpu: GpuId = GPU) -> Token:
        reply = await self.claim(job, gpu=gpu)
        assert reply.code is Code.OK, reply
        assert reply.token is not None
        return reply.token

    async def started(self, job: JobId, gpu: GpuId = GPU) -> Token:
        token = await self.claimed(job, gpu)
        assert (await self.store.start(job, token)).code is Code.OK
        return token

    async def suspected(self, job: JobId, gpu: GpuId = GPU) -> Token:
        token = await self.started(job, gpu)
        self.clock.pass_seconds(LEASE)
        assert (await self.store.expire(job, token)).code is Code.OK
        return token

    async def rescued(self, job: JobId, gpu: GpuId = GPU) -> Token:
        token = await self.suspected(job, gpu)
        assert (await self.store.rescue(job, token, 0.0)).code is Code.OK
        return token

    async def finish(
        self,
        job: JobId,
        token: Token,
        state: JobState = JobState.SUCCEEDED,
        *,
        used: float = CHARGE,
        result: bytes | None = b"done",
    ) -> Reply:
        failure = BROKEN if state is JobState.FAILED else None
        return await self.store.finish(
            job, token, state=state, failure=failure, used_seconds=used, result=result
        )

    async def fail(self, job: JobId, token: Token, again: Again = AGAIN, used: float = CHARGE) -> Reply:
        return await self.store.fail(job, token, BROKEN, again, used_seconds=used)

    async def record(self, job: JobId) -> JobRecord:
        record = await self.store.job(job)
        assert record is not None
        return record

    async def f(self, account: Account = ANN, band: Band = Band.NORMAL) -> float:
        snapshot = await self.store.snapshot()
        return next((f for b, a, f in snapshot.account_f if (b, a) == (band, account)), 0.0)


def claim_request(*jobs: JobId, gpu: GpuId, claim: str, lowest: float | None = None) -> ClaimRequest:
    candidates = (
        ClaimCandidate(job=job, engine=ENGINE, charge_seconds=CHARGE, despite_avoid=True) for job in jobs
    )
    return ClaimRequest(
        node=NODE,
        boot=1,
        gpu=gpu,
        claim=ClaimId(claim),
        lease_seconds=LEASE,
        candidates=tuple(candidates),
        lowest_f=() if lowest is None else ((Band.NORMAL, lowest),),
    )
