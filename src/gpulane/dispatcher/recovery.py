"""What a restart finds, gpu by gpu, and how it comes to an end (fleet.md section 5).

Every gpu with a record, or with an attempt that the store calls started, is occupied until its engine is
known idle or its job
is followed again. First quiet: two answered probes over new connections, since the engine may still read the
request of the
dead process. Then the queue, the history, the queue again. Nothing is ever sent a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from gpulane.core.model import ClaimId, Failure, FailureKind, JobState, Token
from gpulane.dispatcher.gpu import GpuOwner, NodeLease, Payloads, Running, claim_of
from gpulane.engine.base import AttemptContext, Found, Outcome, ServiceClient, is_refused
from gpulane.engine.probe import REFUSALS_FOR_DEAD
from gpulane.engine.progress import ProgressHub
from gpulane.errors import EngineError
from gpulane.store.base import Code, JobRecord, Store
from gpulane.store.node import GpuRecord, NodeStore

SILENT_SECONDS_MAX: Final = 120.0
"""An engine that neither answers nor refuses for so long has lost its job; its gpu stays occupied until it
answers."""

_log = structlog.stdlib.get_logger(__name__)


class Recovery:
    """Brings attempts of an earlier boot to their end."""

    def __init__(
        self,
        *,
        store: Store,
        node_store: NodeStore,
        lease: NodeLease,
        payloads: Payloads,
        hub: ProgressHub,
        quiet_seconds: float,
        new_claim: Callable[[], ClaimId],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._store = store
        self._node_store = node_store
        self._lease = lease
        self._payloads = payloads
        self._hub = hub
        self._quiet_seconds = quiet_seconds
        self._new_claim = new_claim
        self._clock = clock
        self._wall = wall

    async def settle_record(self, owner: GpuOwner, client: ServiceClient, record: GpuRecord) -> None:
        """End the occupancy of a gpu whose record names an attempt that is over in the store."""
        _log.info("recovering", gpu=owner.id, job=record.job, how="orphan")
        try:
            await client.interrupt(record.job)
        except EngineError as error:
            _log.info("orphan_not_interrupted", job=record.job, why=error.message)
        await owner.watches[client.url].until_idle()
        await self._node_store.drop_gpu_record(owner.id, record.token)
        owner.free("recovering")

    async def settle_attempt(
        self, owner: GpuOwner, client: ServiceClient, record: JobRecord, token: Token
    ) -> None:
        """Find a started attempt in its engine and end it, or follow it to its end."""
        job = record.job
        running = Running(
            job=job, token=token, engine=client.url, attempts=max(0, record.attempts_counted - 1)
        )
        running.cancel_wanted = record.cancel_wanted
        running.started_at = self._clock()
        owner.running = running
        owner.occupancy += 1
        _log.info("recovering", gpu=owner.id, job=job.id, how="attempt", engine=client.url)
        found = await self._find(owner, client, running)
        outcome = await self._outcome(owner, client, record, running, found)
        if outcome is None:  # superseded meanwhile
            owner.running = None
            owner.occupancy += 1
            await self.settle_record(owner, client, self._gpu_record(owner, running, claim_of(token)))
            return
        if outcome.engine_idle:
            # settle() frees by the store's event; the reason of the recovery must be gone by then.
            owner.free("recovering")
        await owner.settle(running, record, outcome)

    async def _outcome(
        self, owner: GpuOwner, client: ServiceClient, record: JobRecord, running: Running, found: Found | None
    ) -> Outcome | None:
        job = record.job
        if found is None:
            return _lost("its engine does not answer since the restart", idle=False)
        if job.held:
            # Its client's connection died with the earlier process: wait for the end, deliver to nobody.
            running.cancel_wanted = True
            gone = Failure(
                kind=FailureKind.LOST, code="client_gone", message="its client was lost in a restart"
            )
            await self._store.cancel(job.id, gone)
            await owner.watches[client.url].until_idle()
            return Outcome(state=JobState.CANCELLED, failure=gone)
        if found is Found.ABSENT:
            await owner.watches[client.url].until_idle()
            return _lost("its engine does not know it any more", idle=True)
        if found in {Found.RUNNING, Found.WAITING, Found.BUSY} and not await self._resume(owner, running):
            return None
        payload = await self._payloads.payload(record)
        if payload is None:
            await owner.watches[client.url].until_idle()
            return _lost("its body is gone", idle=True)
        context = AttemptContext(
            job=job, request=payload.request, meta=payload.meta, hub=self._hub, answer=payload.answer
        )
        running.context = context
        if running.cancel_wanted:
            context.cancel_wanted.set()
        _log.info("reattached", job=job.id, gpu=owner.id, found=str(found))
        return await client.follow(context)

    async def _find(self, owner: GpuOwner, client: ServiceClient, running: Running) -> Found | None:
        """Quiet first, then look. None: silent for too long. A process that is gone knows nothing: ABSENT."""
        began = self._clock()
        answered_at: float | None = None
        refused, refused_since = 0, 0.0
        while True:
            now = self._clock()
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
            await asyncio.sleep(max(0.05, self._quiet_seconds / 8))

    async def _resume(self, owner: GpuOwner, running: Running) -> bool:
        """Take the attempt over under a new token. The record is written before asking, so that a crash here
        is seen.
        """
        claim = self._new_claim()
        await self._node_store.put_gpu_record(self._gpu_record(owner, running, claim))
        reply = await self._store.resume(
            self._lease.node,
            self._lease.boot,
            owner.id,
            running.job.id,
            running.token,
            claim,
            self._lease.lease_seconds,
        )
        if reply.code is not Code.OK or reply.token is None:
            _log.warning("not_resumed", job=running.job.id, gpu=owner.id, code=str(reply.code))
            return False
        running.token = reply.token
        await self._node_store.put_gpu_record(self._gpu_record(owner, running, claim))
        return True

    def _gpu_record(self, owner: GpuOwner, running: Running, claim: ClaimId) -> GpuRecord:
        return GpuRecord(
            gpu=owner.id,
            job=running.job.id,
            token=running.token,
            claim=claim,
            engine=running.engine,
            stage="recovering",
            written_at=self._wall(),
        )


def _lost(message: str, *, idle: bool) -> Outcome:
    failure = Failure(kind=FailureKind.LOST, code="lost", message=message)
    return Outcome(state=JobState.FAILED, failure=failure, engine_idle=idle)
