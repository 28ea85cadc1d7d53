"""`Store` on a disk of this machine: the same transitions as in memory, durable before anybody is told.

One process owns the data folder. This side lives on the event loop and touches no database: every verb is
carried to the writer thread, and what is large goes through files on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gpulane.core.events import Snapshot, StoreEvent
from gpulane.core.model import (
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
from gpulane.store.records import check_storable
from gpulane.store.sqlite.database import FolderLock, told_as_store_error
from gpulane.store.sqlite.files import IN_ROW_BYTES_MAX, PayloadFiles
from gpulane.store.sqlite.queue.database import Payload, QueueDatabase
from gpulane.store.sqlite.writer import Writer
from gpulane.store.tables import Tables

T = TypeVar("T")


class SqliteStore:
    """`Store` in a data folder. `clock` tells wall seconds since 1970."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._path = folder / "queue.db"
        self._clock = clock
        self._lock = FolderLock(folder / "queue.pid")
        self._payloads = PayloadFiles(folder / "payloads")
        self._listeners: list[Listener] = []
        self._database: QueueDatabase | None = None
        self._writer: Writer | None = None

    async def open(self) -> None:
        if self._writer is not None:
            return
        self._database = await asyncio.to_thread(self._open_here)
        self._writer = Writer("queue.db", self._database, self._tell)

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()  # which still needs the database, for what was asked before
            await asyncio.to_thread(self._disk().close)
            self._database = None
            self._lock.release()

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def snapshot(self) -> Snapshot:
        return await self._do(lambda tables, now: tables.snapshot(now))

    # -- submission and its end by the user

    async def enqueue(self, new: NewJob, limits: QueueLimits) -> Reply:
        check_storable(new)
        body = await self._payload(new.job.id, "body", new.body)

        def work(tables: Tables, now: float) -> Reply:
            reply = transitions.enqueue(tables, new, limits, now)
            if reply.code is Code.OK:
                self._disk().add(new, body)
            return reply

        reply = await self._do(work)
        if reply.code is not Code.OK:
            await self._discard(body)
        return reply

    async def cancel(self, job: JobId, failure: Failure | None = None) -> Reply:
        return await self._do(lambda tables, now: transitions.cancel(tables, job, failure, now))

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply:
        def work(tables: Tables) -> Reply:
            self._disk().add_rank(job)
            return transitions.prioritise(tables, job, band, priority)

        return await self._do(lambda tables, _: work(tables))

    # -- one attempt

    async def claim(self, request: ClaimRequest) -> Reply:
        return await self._do(lambda tables, now: transitions.claim(tables, request, now))

    async def start(self, job: JobId, token: Token) -> Reply:
        return await self._do(lambda tables, now: transitions.start(tables, job, token, now))

    async def release(self, job: JobId, token: Token, why: str) -> Reply:
        return await self._do(lambda tables, _: transitions.release(tables, job, token, why))

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
        payload = await self._payload(job, "result", result)

        def work(tables: Tables, now: float) -> tuple[Reply, bool]:
            reply, is_kept = transitions.finish(tables, job, token, state, failure, used_seconds, result, now)
            if is_kept and payload is not None:
                self._disk().add_result(job, payload)
            return reply, is_kept

        reply, is_kept = await self._do(work)
        if not is_kept:
            await self._discard(payload)
        return reply

    async def fail(
        self, job: JobId, token: Token, failure: Failure, again: Again, *, used_seconds: Seconds
    ) -> Reply:
        return await self._do(
            lambda tables, now: transitions.fail(tables, job, token, failure, again, used_seconds, now)
        )

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
        return await self._do(lambda tables, now: transitions.resume(tables, asked, now))

    # -- leases and nodes

    async def register(
        self, node: NodeId, boot: int, gpus: tuple[tuple[GpuId, str], ...], name: str
    ) -> RegisterReply:
        return await self._do(lambda tables, now: sweeping.register(tables, node, boot, gpus, name, now))

    async def leave(self, node: NodeId, boot: int) -> Reply:
        return await self._do(lambda tables, _: sweeping.leave(tables, node, boot))

    async def beat(
        self,
        node: NodeId,
        boot: int,
        seen_seconds: Seconds,
        lease_seconds: Seconds,
        leases: tuple[tuple[JobId, Token], ...],
    ) -> BeatReply:
        return await self._do(
            lambda tables, now: sweeping.beat(tables, node, boot, seen_seconds, lease_seconds, leases, now)
        )

    async def expire(self, job: JobId, token: Token) -> Reply:
        return await self._do(lambda tables, now: sweeping.expire(tables, job, token, now))

    async def rescue(self, job: JobId, token: Token, grace_seconds: Seconds) -> Reply:
        return await self._do(lambda tables, now: sweeping.rescue(tables, job, token, grace_seconds, now))

    # -- steering

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        return await self._do(lambda tables, _: sweeping.drain(tables, gpu, draining))

    async def pause(self, paused: bool) -> Reply:
        return await self._do(lambda tables, _: sweeping.pause(tables, paused))

    # -- reading

    async def job(self, job: JobId) -> JobRecord | None:
        return await self._do(lambda tables, _: self._disk().record(tables.find(job)))

    async def job_of_client(self, account: Account, service: Service, client_job_id: str) -> JobRecord | None:
        return await self._do(
            lambda tables, _: self._disk().record(tables.find_client(account, service, client_job_id))
        )

    async def jobs(self, query: JobQuery) -> tuple[JobRecord, ...]:
        return await self._do(lambda _tables, _: self._disk().page(query))

    async def body(self, job: JobId) -> bytes | None:
        return await self._content("body", job)

    async def result(self, job: JobId) -> bytes | None:
        return await self._content("result", job)

    async def forget(self, job: JobId) -> Reply:
        return await self._do(lambda _tables, _: self._disk().forget(job))

    async def prune(self, retention: Retention) -> tuple[JobId, ...]:
        return await self._do(lambda _, now: self._disk().prune(retention, now))

    # -- to the thread and back

    async def _do(self, verb: Callable[[Tables, float], T]) -> T:
        if self._writer is None:
            raise StoreError("the store is closed")
        return await self._writer.do(lambda: verb(self._disk().tables, self._clock()))

    def _disk(self) -> QueueDatabase:
        assert self._database is not None
        return self._database

    def _tell(self, events: Sequence[StoreEvent]) -> None:
        for listener in self._listeners:
            listener(tuple(events))

    def _open_here(self) -> QueueDatabase:
        folder = self._path.parent
        with told_as_store_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        try:
            database = QueueDatabase(self._path, self._payloads)
            database.load()
        except BaseException:
            self._lock.release()
            raise
        return database

    # -- what is large

    async def _payload(self, job: JobId, kind: str, content: bytes | None) -> Payload | None:
        if content is None:
            return None
        if len(content) <= IN_ROW_BYTES_MAX:
            return Payload(content=content)
        return Payload(content=None, file=await asyncio.to_thread(self._payloads.write, job, kind, content))

    async def _discard(self, payload: Payload | None) -> None:
        if payload is not None and payload.file is not None:
            await asyncio.to_thread(self._payloads.remove, [payload.file])

    async def _content(self, kind: str, job: JobId) -> bytes | None:
        payload = await self._do(lambda _tables, _: self._disk().payload(kind, job))
        if payload is None or payload.file is None:
            return None if payload is None else payload.content
        return await asyncio.to_thread(self._payloads.read, payload.file)
