"""The heartbeat of this node and, when the store hands it out, the sweep: leases renewed, expired attempts
taken, old jobs pruned.

An expired lease is never renewed: its holder resumes under a new token, or finds that it was superseded.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from gpulane.core.model import ClaimId, JobId, Token
from gpulane.dispatcher.gpu import GpuOwner, NodeLease
from gpulane.errors import StoreError
from gpulane.store.base import BeatReply, Code, Retention, Store

BEAT_SECONDS: Final = 5.0
LEASE_SECONDS: Final = 30.0
GRACE_SECONDS: Final = 60.0
"""How long a started attempt whose holder fell silent is left to it."""
PRUNE_SECONDS: Final = 60.0

_log = structlog.stdlib.get_logger(__name__)


class Leases:
    """Beats for all gpus of this node."""

    def __init__(
        self,
        store: Store,
        lease: NodeLease,
        owners: Iterable[GpuOwner],
        *,
        retention: Retention,
        on_pruned: Callable[[JobId], None],
        new_claim: Callable[[], ClaimId],
    ) -> None:
        self._store = store
        self._lease = lease
        self._owners = tuple(owners)
        self._retention = retention
        self._on_pruned = on_pruned
        self._new_claim = new_claim
        self._random = random.Random()
        self.last_reply: BeatReply | None = None

    async def run(self) -> None:
        """Beat for ever, until cancelled."""
        while True:
            try:
                await self.beat()
            except StoreError as error:
                _log.error("beat_failed", why=error.message)
            await asyncio.sleep(BEAT_SECONDS * self._random.uniform(0.8, 1.2))

    async def beat(self) -> None:
        """Renew what this node holds, and sweep what the store says is due."""
        pairs = {owner: pair for owner in self._owners if (pair := owner.lease_pair()) is not None}
        reply = await self._store.beat(
            self._lease.node,
            self._lease.boot,
            LEASE_SECONDS,
            self._lease.lease_seconds,
            tuple(pairs.values()),
        )
        self.last_reply = reply
        if reply.code is Code.STALE:
            _log.error(
                "node_superseded",
                node=self._lease.node,
                hint="another process uses this data folder's node id",
            )
            return
        codes = dict(reply.leases)
        for owner, (job, token) in pairs.items():
            await self._apply(owner, job, token, codes.get(job))
        for job, token in reply.expired:
            await self._store.expire(job, token)
        for job, token in reply.suspects:
            await self._store.rescue(job, token, GRACE_SECONDS)

    async def prune(self) -> None:
        """Forget ended jobs beyond the retention, for ever, until cancelled."""
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            try:
                while dropped := await self._store.prune(self._retention):
                    for job in dropped:
                        self._on_pruned(job)
            except StoreError as error:
                _log.error("prune_failed", why=error.message)

    async def _apply(self, owner: GpuOwner, job: JobId, token: Token, code: Code | None) -> None:
        running = owner.running
        if running is None or running.job.id != job or running.token != token:
            return  # ended while the beat was under way
        if code is Code.CANCEL:
            owner.cancel(job)
        elif code is Code.EXPIRED:
            reply = await self._store.resume(
                self._lease.node,
                self._lease.boot,
                owner.id,
                job,
                token,
                self._new_claim(),
                self._lease.lease_seconds,
            )
            if reply.code is Code.OK and reply.token is not None and owner.running is running:
                running.token = reply.token
                _log.warning("lease_resumed", job=job, gpu=owner.id)
            elif reply.code is Code.GONE:
                owner.cancel(job)
        elif code is Code.GONE:
            # Superseded: what runs here is an orphan, to be interrupted; its end will be STALE.
            _log.warning("attempt_superseded", job=job, gpu=owner.id)
            owner.cancel(job)
