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

from gpulane.core.model import JobId
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.dispatcher.ports import NodeLease, Running
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
        on_pruned: Callable[[tuple[JobId, ...]], None],
        chance: random.Random,
    ) -> None:
        self._store = store
        self._lease = lease
        self._owners = tuple(owners)
        self._retention = retention
        self._on_pruned = on_pruned
        self._chance = chance
        self.last_reply: BeatReply | None = None

    async def run(self) -> None:
        """Beat for ever, until cancelled."""
        while True:
            try:
                await self.beat()
            except StoreError as error:
                _log.error("beat_failed", why=error.message)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("beat_broke")  # without beats, every lease of this node would run out
            await asyncio.sleep(BEAT_SECONDS * self._chance.uniform(0.8, 1.2))

    async def beat(self) -> None:
        """Renew what this node holds, and sweep what the store says is due.

        In this order: after a long stop of this process its own attempts are due too, and are resumed first.
        """
        held = [(owner, running, running.token) for owner in self._owners for running in owner.leased()]
        reply = await self._store.beat(
            self._lease.node,
            self._lease.boot,
            LEASE_SECONDS,
            self._lease.lease_seconds,
            tuple((running.job.id, token) for _, running, token in held),
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
        for owner, running, token in held:
            if (
                running.token == token and running in owner.leased()
            ):  # else it ended while the beat was under way
                await self._apply(owner, running, codes.get(running.job.id))
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
                    # Hundreds of folders at once, perhaps on a slow disk.
                    await asyncio.to_thread(self._on_pruned, dropped)
            except StoreError as error:
                _log.error("prune_failed", why=error.message)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("prune_broke")

    async def _apply(self, owner: GpuOwner, running: Running, code: Code | None) -> None:
        job = running.job.id
        if code is Code.CANCEL:
            running.cancel()
        elif running.started_at is None:
            pass  # `start` will be told the same, and gives the claim back
        elif code is Code.EXPIRED or (code is Code.GONE and running.resuming is not None):
            # While a resume was asked and not answered, GONE may be its doing (fleet.md 12, case 13b).
            resumed = await owner.resume(running)
            if resumed is Code.OK:
                _log.warning("lease_resumed", job=job, gpu=owner.id)
            elif resumed is Code.GONE:
                running.cancel()
        elif code is Code.GONE:
            # Superseded: what runs here is an orphan, to be interrupted; its end will be STALE.
            _log.warning("attempt_superseded", job=job, gpu=owner.id)
            running.cancel()
