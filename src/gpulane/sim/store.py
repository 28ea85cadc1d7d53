"""A toy store for the simulator: it makes the store events, with F, V and tokens, and refuses what a store
must refuse.

It follows the contract's prose and shares no code with the product's stores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpulane.core.events import (
    ActiveJob,
    AttemptFailed,
    CancelWanted,
    GpuDrained,
    JobClaimed,
    JobEnded,
    JobReleased,
    JobStarted,
    JobSubmitted,
    Snapshot,
    StoreEvent,
    WaitingJob,
)
from gpulane.core.model import (
    Account,
    Band,
    Charge,
    ClaimId,
    Failure,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Token,
)
from gpulane.core.retry import Again


@dataclass(slots=True, eq=False)
class Record:
    """One job's record."""

    job: Job
    state: JobState = JobState.QUEUED
    token: Token | None = None
    gpu: GpuId | None = None
    node: NodeId | None = None
    started: bool = False
    cancel_wanted: bool = False
    attempts: int = 0
    engine_kills: int = 0
    avoid: frozenset[GpuId] = frozenset()
    not_before: Seconds = 0.0
    charged: float = 0.0
    """What the current attempt has added to F."""


@dataclass(slots=True, eq=False)
class ToyStore:
    """Records, F and V, and the number of the last event."""

    n: int = 0
    records: dict[JobId, Record] = field(default_factory=dict[JobId, Record])
    open_jobs: dict[JobId, Record] = field(default_factory=dict[JobId, Record])
    slots: dict[GpuId, JobId] = field(default_factory=dict[GpuId, JobId])
    f: dict[tuple[Band, Account], float] = field(default_factory=dict[tuple[Band, Account], float])
    v: dict[Band, float] = field(default_factory=dict[Band, float])
    draining: set[GpuId] = field(default_factory=set[GpuId])
    ends: dict[JobId, int] = field(default_factory=dict[JobId, int])
    """How often each job's end was recorded: once."""

    def enqueue(self, job: Job) -> StoreEvent:
        self.n += 1
        key = (job.band, job.account)
        if not any(r.token is None and (r.job.band, r.job.account) == key for r in self.open_jobs.values()):
            self.f[key] = max(self.f.get(key, 0.0), self.v.get(job.band, 0.0))
        self.records[job.id] = self.open_jobs[job.id] = Record(job)
        return JobSubmitted(n=self.n, job=job, account_f=self.f[key])

    def claim(
        self,
        gpu: GpuId,
        node: NodeId,
        candidates: tuple[tuple[JobId, Charge], ...],
        lowest_f: tuple[tuple[Band, float], ...],
        now: Seconds,
    ) -> JobClaimed | None:
        if gpu in self.slots or gpu in self.draining:
            return None
        for job, charge in candidates:
            record = self.open_jobs.get(job)
            if record is None or record.token is not None or record.not_before > now:
                continue
            self.n += 1
            band, key = record.job.band, (record.job.band, record.job.account)
            record.token, record.gpu, record.node = Token(f"{self.n}.c"), gpu, node
            self.slots[gpu] = job
            self.v[band] = max(self.v.get(band, 0.0), dict(lowest_f).get(band, 0.0))
            record.charged = charge.total / record.job.weight
            self.f[key] += record.charged
            return JobClaimed(
                n=self.n,
                job=job,
                gpu=gpu,
                node=node,
                token=record.token,
                claim=ClaimId("c"),
                account_f=self.f[key],
                band_v=self.v[band],
            )
        return None

    def start(self, job: JobId, token: Token) -> StoreEvent | None:
        record = self._held(job, token)
        if record is None or record.started:
            return None
        self.n += 1
        record.started, record.attempts, record.state = True, record.attempts + 1, JobState.RUNNING
        return JobStarted(n=self.n, job=job, token=token, attempts=record.attempts)

    def release(self, job: JobId, token: Token) -> StoreEvent | None:
        record = self._held(job, token)
        if record is None or record.started:
            return None
        self.n += 1
        f = self._correct(record, 0.0)
        self._let_go(record)
        return JobReleased(n=self.n, job=job, token=token, account_f=f, why="simulated")

    def fail(
        self, job: JobId, token: Token, failure: Failure, again: Again, used: Seconds, now: Seconds
    ) -> StoreEvent | None:
        record = self._held(job, token)
        if record is None or not record.started:
            return None
        if record.cancel_wanted:
            return self.finish(job, token, JobState.CANCELLED, failure, used)
        self.n += 1
        f = self._correct(record, 0.0 if again.refund else used)
        record.engine_kills += failure.killed_engine
        record.avoid, record.not_before = again.avoid, now + again.rest_seconds
        self._let_go(record)
        record.state = JobState.WAITING_RETRY
        return AttemptFailed(
            n=self.n,
            job=job,
            token=token,
            failure=failure,
            avoid=again.avoid,
            not_before_seconds=again.rest_seconds,
            account_f=f,
        )

    def finish(
        self, job: JobId, token: Token, state: JobState, failure: Failure | None, used: Seconds
    ) -> StoreEvent | None:
        record = self._held(job, token)
        if record is None or not record.started:
            return None
        state = JobState.CANCELLED if record.cancel_wanted else state
        return self._end(record, state, failure, self._correct(record, used))

    def cancel(self, job: JobId) -> StoreEvent | None:
        record = self.open_jobs.get(job)
        if record is None or record.cancel_wanted:
            return None
        if record.started:
            self.n += 1
            record.cancel_wanted = True
            return CancelWanted(n=self.n, job=job)
        return self._end(record, JobState.CANCELLED, None, self._correct(record, 0.0))

    def drain(self, gpu: GpuId, draining: bool) -> StoreEvent:
        self.n += 1
        (self.draining.add if draining else self.draining.discard)(gpu)
        return GpuDrained(n=self.n, gpu=gpu, draining=draining)

    def snapshot(self, now: Seconds) -> Snapshot:
        records = self.open_jobs.values()
        return Snapshot(
            n=self.n,
            waiting=tuple(
                WaitingJob(
                    job=r.job,
                    attempts=r.attempts,
                    avoid=r.avoid,
                    not_before_seconds=max(r.not_before - now, 0.0),
                )
                for r in records
                if r.token is None
            ),
            active=tuple(
                ActiveJob(
                    job=r.job,
                    gpu=r.gpu,
                    node=r.node,
                    token=r.token,
                    started=r.started,
                    cancel_wanted=r.cancel_wanted,
                    attempts=r.attempts,
                    avoid=r.avoid,
                )
                for r in records
                if r.token is not None and r.gpu is not None and r.node is not None
            ),
            account_f=tuple((band, account, f) for (band, account), f in self.f.items()),
            band_v=tuple(self.v.items()),
            draining=frozenset(self.draining),
            paused=False,
        )

    def _held(self, job: JobId, token: Token) -> Record | None:
        """Returns the record if the token is the current one: the fence."""
        record = self.open_jobs.get(job)
        return record if record is not None and record.token == token else None

    def _correct(self, record: Record, used: Seconds) -> float:
        key = (record.job.band, record.job.account)
        self.f[key] += used / record.job.weight - record.charged
        record.charged = 0.0
        return self.f[key]

    def _let_go(self, record: Record) -> None:
        if record.gpu is not None:
            del self.slots[record.gpu]
        record.token, record.gpu, record.started = None, None, False

    def _end(self, record: Record, state: JobState, failure: Failure | None, f: float) -> JobEnded:
        self.n += 1
        self._let_go(record)
        record.state = state
        del self.open_jobs[record.job.id]
        self.ends[record.job.id] = self.ends.get(record.job.id, 0) + 1
        return JobEnded(n=self.n, job=record.job.id, state=state, account_f=f, failure=failure)
