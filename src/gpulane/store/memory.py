"""The store without a disk: for tests, simulations and `--ephemeral`. What it acknowledges dies with the
process.

It is the tables and the transitions and nothing else, so it is also the shortest reading of the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import nlargest
from typing import TypeVar

from gpulane.core.events import Snapshot
from gpulane.core.model import (
    ENDED,
    Account,
    Band,
    ClaimId,
    Failure,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Service,
    Token,
)
from gpulane.errors import StoreError
from gpulane.store import sweeping, transitions
from gpulane.store.base import (
    PAGE_MAX,
    PRUNE_MAX,
    Again,
    BeatReply,
    ClaimRequest,
    Code,
    JobQuery,
    JobRecord,
    Listener,
    NewJob,
    QueueLimits,
    RegisterReply,
    Reply,
    Retention,
)
from gpulane.store.records import Row, check_storable, matches, record_of
from gpulane.store.tables import Tables

R = TypeVar("R")


class MemoryArchive:
    """Ended jobs, in order of their end, and whose names they still hold."""

    def __init__(self) -> None:
        self.rows: dict[JobId, Row] = {}
        self._clients: dict[tuple[Account, Service, str], JobId] = {}
        self._keys: dict[tuple[Account, str], JobId] = {}

    def find(self, job: JobId) -> Row | None:
        return self.rows.get(job)

    def find_client(self, account: Account, service: Service, client_job_id: str) -> Row | None:
        job = self._clients.get((account, service, client_job_id))
        return None if job is None else self.rows[job]

    def find_key(self, account: Account, idempotency_key: str) -> Row | None:
        job = self._keys.get((account, idempotency_key))
        return None if job is None else self.rows[job]

    def keep(self, row: Row) -> None:
        job = row.job
        self.rows[job.id] = row
        if row.client_job_id is not None:
            self._clients[job.account, job.service, row.client_job_id] = job.id
        if row.idempotency_key is not None:
            self._keys[job.account, row.idempotency_key] = job.id

    def drop(self, job: JobId) -> None:
        row = self.rows.pop(job)
        if row.client_job_id is not None:
            del self._clients[row.job.account, row.job.service, row.client_job_id]
        if row.idempotency_key is not None:
            del self._keys[row.job.account, row.idempotency_key]


class MemoryStore:
    """`Store` in this process's memory. `clock` tells wall seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._archive = MemoryArchive()
        self._tables = Tables(self._archive)
        self._metas: dict[JobId, bytes] = {}
        self._bodies: dict[JobId, bytes] = {}
        self._results: dict[JobId, bytes] = {}
        self._listeners: list[Listener] = []
        self._is_open = False

    async def open(self) -> None:
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def snapshot(self) -> Snapshot:
        return self._now_open().snapshot(self._clock())

    # -- submission and its end by the user

    async def enqueue(self, new: NewJob, limits: QueueLimits) -> Reply:
        check_storable(new)
        reply = transitions.enqueue(self._now_open(), new, limits, self._clock())
        if reply.code is Code.OK:
            self._metas[new.job.id] = new.meta
            if new.body is not None:
                self._bodies[new.job.id] = new.body
        return self._told(reply)

    async def cancel(self, job: JobId, failure: Failure | None = None) -> Reply:
        return self._told(transitions.cancel(self._now_open(), job, failure, self._clock()))

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply:
        return self._told(transitions.prioritise(self._now_open(), job, band, priority))

    # -- one attempt

    async def claim(self, request: ClaimRequest) -> Reply:
        return self._told(transitions.claim(self._now_open(), request, self._clock()))

    async def start(self, job: JobId, token: Token) -> Reply:
        return self._told(transitions.start(self._now_open(), job, token, self._clock()))

    async def release(self, job: JobId, token: Token, why: str) -> Reply:
        return self._told(transitions.release(self._now_open(), job, token, why))

    async def finish(
        self,
        job: JobId,
        token: Token,
        *,
        state: JobState,
        failure: Failure | None,
        used_seconds: Seconds,
        result: bytes | None,
    ) -> Reply:
        tables, now = self._now_open(), self._clock()
        reply, is_kept = transitions.finish(tables, job, token, state, failure, used_seconds, result, now)
        if is_kept and result is not None:
            self._results[job] = result
        return self._told(reply)

    async def fail(
        self, job: JobId, token: Token, failure: Failure, again: Again, *, used_seconds: Seconds
    ) -> Reply:
        tables, now = self._now_open(), self._clock()
        return self._told(transitions.fail(tables, job, token, failure, again, used_seconds, now))

    async def resume(
        self,
        node: NodeId,
        boot: int,
        gpu: GpuId,
        job: JobId,
        token: Token,
        claim: ClaimId,
        lease_seconds: Seconds,
    ) -> Reply:
        asked = transitions.Resume(
            node=node, boot=boot, gpu=gpu, job=job, token=token, claim=claim, lease_seconds=lease_seconds
        )
        return self._told(transitions.resume(self._now_open(), asked, self._clock()))

    # -- leases and nodes

    async def register(
        self, node: NodeId, boot: int, gpus: tuple[tuple[GpuId, str], ...], name: str
    ) -> RegisterReply:
        return self._told(sweeping.register(self._now_open(), node, boot, gpus, name, self._clock()))

    async def leave(self, node: NodeId, boot: int) -> Reply:
        return self._told(sweeping.leave(self._now_open(), node, boot))

    async def beat(
        self,
        node: NodeId,
        boot: int,
        seen_seconds: Seconds,
        lease_seconds: Seconds,
        leases: tuple[tuple[JobId, Token], ...],
    ) -> BeatReply:
        tables, now = self._now_open(), self._clock()
        return self._told(sweeping.beat(tables, node, boot, seen_seconds, lease_seconds, leases, now))

    async def expire(self, job: JobId, token: Token) -> Reply:
        return self._told(sweeping.expire(self._now_open(), job, token, self._clock()))

    async def rescue(self, job: JobId, token: Token, grace_seconds: Seconds) -> Reply:
        return self._told(sweeping.rescue(self._now_open(), job, token, grace_seconds, self._clock()))

    # -- steering

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        return self._told(sweeping.drain(self._now_open(), gpu, draining))

    async def pause(self, paused: bool) -> Reply:
        return self._told(sweeping.pause(self._now_open(), paused))

    # -- reading

    async def job(self, job: JobId) -> JobRecord | None:
        return self._shown(self._now_open().find(job))

    async def job_of_client(self, account: Account, service: Service, client_job_id: str) -> JobRecord | None:
        return self._shown(self._now_open().find_client(account, service, client_job_id))

    async def jobs(self, query: JobQuery) -> tuple[JobRecord, ...]:
        rows = [*self._now_open().live.values(), *self._archive.rows.values()]
        page = nlargest(
            min(query.limit, PAGE_MAX),
            (row for row in rows if matches(row, query)),
            key=lambda row: row.job.arrival,
        )
        return tuple(record_of(row, self._metas[row.job.id]) for row in page)

    async def body(self, job: JobId) -> bytes | None:
        return self._bodies.get(job)

    async def result(self, job: JobId) -> bytes | None:
        return self._results.get(job)

    async def forget(self, job: JobId) -> Reply:
        tables = self._now_open()
        row = tables.find(job)
        if row is None or row.state not in ENDED:
            return Reply(code=Code.BUSY if row else Code.UNKNOWN, n=tables.n, job=job)
        self._drop(job)
        return Reply(code=Code.OK, n=tables.n, job=job)

    async def prune(self, retention: Retention) -> tuple[JobId, ...]:
        now, rows = self._clock(), self._archive.rows
        count, size = len(rows), sum(row.size for row in rows.values())
        gone: list[JobId] = []
        for job, row in rows.items():  # oldest end first
            is_old = (row.finished_at or 0.0) <= now - retention.ended_seconds
            is_over = count > retention.ended_jobs_max or size > retention.result_bytes_max
            if len(gone) == PRUNE_MAX or not (is_old or is_over):
                break
            gone.append(job)
            count, size = count - 1, size - row.size
        for job in gone:
            self._drop(job)
        self._tables.prune_accounts()
        self._told(None)
        return tuple(gone)

    # --

    def _now_open(self) -> Tables:
        if not self._is_open:
            raise StoreError("the store is closed")
        return self._tables

    def _told(self, reply: R) -> R:
        events = tuple(self._tables.take_changes().events)
        for listener in self._listeners if events else ():
            listener(events)
        return reply

    def _shown(self, row: Row | None) -> JobRecord | None:
        return None if row is None else record_of(row, self._metas[row.job.id])

    def _drop(self, job: JobId) -> None:
        self._archive.drop(job)
        for kept in (self._metas, self._bodies, self._results):
            kept.pop(job, None)
