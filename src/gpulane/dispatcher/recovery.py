"""What a restart finds, gpu by gpu, and how it comes to an end (fleet.md section 5).

Every gpu with a record, or with an attempt that the store calls started, is occupied before anything is
decided, until its engine is known idle or its job is followed again. First quiet: two answered probes over
new connections, since the engine may still read the request of the dead process. Then the queue, the
history, the queue again. Nothing is ever sent a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Final

import structlog

from gpulane.core.events import ActiveJob
from gpulane.core.model import EngineUrl, Failure, FailureKind, GpuId, JobId, JobState, Service
from gpulane.dispatcher.attempt import broken
from gpulane.dispatcher.ending import drop_record, free_when_idle, recovering, settle
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.dispatcher.insist import insist
from gpulane.dispatcher.ports import GpuParts, Running
from gpulane.engine.base import AttemptContext, Found, Outcome, ServiceClient, is_refused
from gpulane.engine.probe import REFUSALS_FOR_DEAD, until_idle
from gpulane.errors import EngineError
from gpulane.store.base import Again, Code, JobRecord
from gpulane.store.node import GpuRecord

SILENT_SECONDS_MAX: Final = 120.0
"""An engine that neither answers nor refuses for so long has lost its job; its gpu stays occupied until it
answers."""

Work = Coroutine[object, object, None]
_log = structlog.stdlib.get_logger(__name__)


class Recovery:
    """Brings attempts of an earlier boot to their end."""

    def __init__(
        self,
        parts: GpuParts,
        owners: Mapping[GpuId, GpuOwner],
        *,
        quiet_seconds: float,
        client_for: Callable[[EngineUrl, Service], ServiceClient] | None,
    ) -> None:
        self._parts = parts
        self._owners = owners
        self._quiet_seconds = quiet_seconds
        self._client_for = client_for

    async def begin(self) -> list[Work]:
        """Occupy every gpu whose earlier work may still be under way; returns what brings each to its end.

        Raises StoreError: a gateway that does not know what its gpus do must not start.
        """
        node, store = self._parts.lease.node, self._parts.store
        actives = [a for a in (await store.snapshot()).active if a.started and a.node == node]
        jobs = [await store.job(active.job.id) for active in actives]
        records = await self._parts.records.gpu_records()
        # An engine that was taken out of the settings may compute on: its card is not free for the others on
        # it.
        strangers = [record for record in records if self._owner_of(record.gpu, record.engine) is None]
        services = [await store.job(record.job) for record in strangers]
        found = [self._begin_attempt(active, job) for active, job in zip(actives, jobs, strict=True)]
        found += [self._begin_removed(r, job) for r, job in zip(strangers, services, strict=True)]
        return [*(work for work in found if work is not None), *self._begin_records(records)]

    def _begin_attempt(self, active: ActiveJob, record: JobRecord | None) -> Work | None:
        if record is None or record.engine is None:
            return None
        owner = self._owner_of(active.gpu, record.engine)
        running = Running(
            job=record.job,
            gpu=active.gpu,
            token=active.token,
            engine=record.engine,
            attempts=max(0, record.attempts_counted - 1),
            started_at=self._parts.clock(),
            cancel_wanted=record.cancel_wanted,
        )
        if owner is None or not owner.is_quiet:
            # Nobody can follow it any more, or two gpus of earlier settings are one now.
            return self._lose(running, record, owner)
        owner.occupy(recovering(running), "looking for the job that ran before the restart")
        owner.adopt(running)
        return self._settle_attempt(owner, running, record)

    def _begin_records(self, records: Iterable[GpuRecord]) -> list[Work]:
        """Records of jobs that are over in the store: their engines may compute them all the same."""
        found: list[Work] = []
        for record in records:
            owner = self._owner_of(record.gpu, record.engine)
            if owner is None or (owner.running is not None and owner.running.job.id == record.job):
                continue
            key = f"recovering record {record.job}"
            owner.occupy(key, "waiting until the engine is known idle after the restart")
            found.append(self._settle_record(owner, key, record))
        return found

    def _begin_removed(self, record: GpuRecord, job: JobRecord | None) -> Work | None:
        owner = self._owners.get(record.gpu)
        if owner is None or job is None or self._client_for is None:
            return None
        if job.job.service is Service.LOCK:
            return None  # the gpu's lock file tells whether its program still runs
        key = f"recovering record {record.job}"
        owner.occupy(key, f"waiting until {record.engine}, no longer in the settings, is known idle")
        return self._settle_removed(owner, key, record, self._client_for(record.engine, job.job.service))

    async def _settle_removed(
        self, owner: GpuOwner, key: str, record: GpuRecord, client: ServiceClient
    ) -> None:
        _log.info("recovering", gpu=owner.id, job=record.job, how="engine removed", engine=record.engine)
        await self._keep_out(owner, record.job)
        try:
            await _interrupt(client, record.job)
            await until_idle(client, self._quiet_seconds, self._parts.clock)
        finally:
            await client.close()
        await drop_record(self._parts, record.gpu, record.token)
        owner.free(key)

    def _owner_of(self, gpu: GpuId, engine: EngineUrl) -> GpuOwner | None:
        """A gpu may have got another name, or a machine another host name: the engine tells which one it
        is.
        """
        owner = self._owners.get(gpu)
        if owner is not None and engine in owner.watches:
            return owner
        return next((other for other in self._owners.values() if engine in other.watches), None)

    # --- a record without an attempt

    async def _settle_record(self, owner: GpuOwner, key: str, record: GpuRecord) -> None:
        client = self._parts.clients[record.engine]
        _log.info("recovering", gpu=owner.id, job=record.job, how="orphan")
        await self._keep_out(owner, record.job)
        await _interrupt(client, record.job)
        await owner.watches[client.url].until_idle()
        await drop_record(self._parts, record.gpu, record.token)
        owner.free(key)

    async def _keep_out(self, owner: GpuOwner, job: JobId) -> None:
        """Take the lock file for a job that may still run, unless it was a program's, which has it itself."""
        if owner.card_lock is None:
            return
        record = await insist(lambda: self._parts.store.job(job), "the job of a gpu record")
        if record is not None:
            await owner.card_lock.acquire(record.job, patience_seconds=0.0)

    # --- an attempt

    async def _settle_attempt(self, owner: GpuOwner, running: Running, record: JobRecord) -> None:
        _log.info("recovering", gpu=owner.id, job=running.job.id, how="attempt", engine=running.engine)
        try:
            outcome = await self._outcome(owner, running, record)
        except Exception as error:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("recovery_broke", job=running.job.id, gpu=owner.id)
            outcome = broken(error)
        if outcome is None:
            # Superseded: what runs there is an orphan.
            owner.leave(running)
            await _interrupt(self._parts.clients[running.engine], running.job.id)
            await free_when_idle(owner, running)
        else:
            if outcome.engine_idle:
                # The store's event gives the gpu its next job: the reason must be gone by then.
                owner.free(recovering(running))
            await settle(owner, running, running, record, outcome)

    async def _outcome(self, owner: GpuOwner, running: Running, record: JobRecord) -> Outcome | None:
        """1. silent  2. nobody waits for it any more  3. not known there  4. taken over  5. read from
        history.

        None: superseded.
        """
        if owner.card_lock is not None:
            # Programs that wait for the file must not get in beside a job that goes on.
            await owner.card_lock.acquire(running.job, patience_seconds=0.0)
        client = self._parts.clients[running.engine]
        found = await self._find(client, running)
        if found is None:
            return _lost("its engine does not answer since the restart", idle=False)
        if running.job.held:
            return await self._end_held(owner, client, running)
        if found is Found.ABSENT:
            await owner.watches[client.url].until_idle()
            return _lost("its engine does not know it any more", idle=True)
        is_there = found in {Found.RUNNING, Found.WAITING, Found.BUSY}
        if is_there and not await self._resume(owner, running):
            return None
        payload = await insist(lambda: self._parts.payloads.payload(record), "the body of a running job")
        if payload is None:
            await owner.watches[client.url].until_idle()
            return _lost("its body is gone", idle=True)
        context = AttemptContext(
            job=record.job,
            request=payload.request,
            meta=payload.meta,
            hub=self._parts.hub,
            answer=payload.answer,
        )
        running.enter(context)
        _log.info("reattached", job=running.job.id, gpu=owner.id, found=str(found))
        return await client.follow(context)

    async def _end_held(self, owner: GpuOwner, client: ServiceClient, running: Running) -> Outcome:
        """Its client's connection died with the earlier process: nobody can be given its answer."""
        running.cancel_wanted = True
        gone = Failure(kind=FailureKind.LOST, code="client_gone", message="its client was lost in a restart")
        await insist(lambda: self._parts.store.cancel(running.job.id, gone), "the cancel of a held job")
        await _interrupt(client, running.job.id)
        await owner.watches[client.url].until_idle()
        return Outcome(state=JobState.CANCELLED, failure=gone)

    async def _find(self, client: ServiceClient, running: Running) -> Found | None:
        """Quiet first, then look. None: silent for too long. A process that is gone knows nothing: ABSENT."""
        clock = self._parts.clock
        began = clock()
        answered_at: float | None = None
        refused, refused_since = 0, 0.0
        while True:
            now = clock()
            try:
                await client.probe(frozenset({running.job.id}), fresh=True)
                if answered_at is None:
                    answered_at = now
                elif now - answered_at >= self._quiet_seconds:
                    return await client.find(running.job.id, fresh=True)
                refused = 0
            except EngineError as error:
                answered_at = None
                if is_refused(error):
                    refused += 1
                    refused_since = now if refused == 1 else refused_since
                    if refused >= REFUSALS_FOR_DEAD and now - refused_since >= self._quiet_seconds:
                        return Found.ABSENT
                elif now - began > SILENT_SECONDS_MAX:
                    return None
                else:
                    refused = 0
            await asyncio.sleep(max(0.05, self._quiet_seconds / 8))

    async def _resume(self, owner: GpuOwner, running: Running) -> bool:
        code = await insist(lambda: owner.resume(running), "the resume of a running job")
        if code is not Code.OK:
            _log.warning("not_resumed", job=running.job.id, gpu=owner.id, code=str(code))
        return code is Code.OK

    # --- an attempt that nobody can follow

    async def _lose(self, running: Running, record: JobRecord, owner: GpuOwner | None) -> None:
        """Give up a job whose engine is no longer in the settings, or whose gpu is another job's now."""
        if owner is not None:
            key = recovering(running)
            owner.occupy(key, "waiting until the engine is known idle after the restart")
            if owner.card_lock is not None:
                await owner.card_lock.acquire(running.job, patience_seconds=0.0)
            await _interrupt(self._parts.clients[running.engine], running.job.id)
            await free_when_idle(owner, running)
        failure = Failure(
            kind=FailureKind.LOST, code="lost", message="its engine or gpu is no longer in the settings"
        )
        await insist(lambda: self._give_up(running, record, failure), "the end of a lost job")

    async def _give_up(self, running: Running, record: JobRecord, failure: Failure) -> None:
        job, token, store = running.job, running.token, self._parts.store
        if job.rerun_lost and not job.held and record.attempts_counted < job.max_attempts:
            again = Again(rest_seconds=0.0, avoid=frozenset(), refund=True)
            await store.fail(job.id, token, failure, again, used_seconds=0.0)
        else:
            await store.finish(
                job.id, token, state=JobState.FAILED, failure=failure, used_seconds=0.0, result=None
            )


async def _interrupt(client: ServiceClient, job: JobId) -> None:
    try:
        await client.interrupt(job)
    except EngineError as error:
        _log.info("orphan_not_interrupted", job=job, why=error.message)
    except Exception:  # noqa: BLE001  it only saves time: what comes after it waits until the engine is idle
        _log.exception("interrupt_broke", job=job)


def _lost(message: str, *, idle: bool) -> Outcome:
    failure = Failure(kind=FailureKind.LOST, code="lost", message=message)
    return Outcome(state=JobState.FAILED, failure=failure, engine_idle=idle)
