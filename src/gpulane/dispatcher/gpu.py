"""One gpu of this node: what holds it, and who may begin work on it. Exclusivity does not depend on the
store.

The card is held from before a claim is asked for until its attempt has left it, and occupied beyond that for
as long as any reason stands (a stranger's work, an engine not known idle). Only `begin`, `adopt` and
`take_for` take it, and each looks and takes in one step, with no await between.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from gpulane.core.breaker import Breaker
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import GpuFreed, GpuOccupied, GpuPaused
from gpulane.core.model import ClaimId, EngineUrl, Failure, Gpu, GpuId, JobId, Token
from gpulane.dispatcher.attempt import Attempt
from gpulane.dispatcher.cardlock import CardLock
from gpulane.dispatcher.handoff import Handoff
from gpulane.dispatcher.ports import GpuParts, Running
from gpulane.engine.probe import EngineWatch
from gpulane.store.base import Code
from gpulane.store.node import GpuRecord

_log = structlog.stdlib.get_logger(__name__)

REST_SECONDS: Final = 0.5
"""How long a gpu rests when something was in the way: it will hardly be gone at once."""
REST_SECONDS_MAX: Final = 8.0
"""Doubled up to this while nothing starts: what stays in the way must not cost claims without end."""


class GpuOwner:
    """Begins, follows and ends everything on one gpu."""

    def __init__(self, gpu: Gpu, parts: GpuParts) -> None:
        self.gpu = gpu
        self.parts = parts
        self.running: Running | None = None
        self.ending: set[Running] = set()
        """Attempts that have left the card, whose ends are not recorded yet: their leases are still
        renewed."""
        self.watches: dict[EngineUrl, EngineWatch] = {}
        self.occupancy = 0
        """Rises by one whenever the card is taken by us or left: odd while we hold it."""
        self.handoff: Handoff | None = None
        """Clears the card for its next job; None: nothing to hand over (tests, a gpu with one engine)."""
        self.card_lock: CardLock | None = None
        """The file with which other programs take part."""
        self.breaker = Breaker(parts.breaker_limits)
        self.is_stopping = False
        """Nothing new is begun; what is claimed but not started is given back."""
        self._holder: object | None = None
        self._reasons: dict[str, str] = {}
        self._rest_seconds = REST_SECONDS
        self._rest_timer: asyncio.TimerHandle | None = None

    # --- what others ask

    @property
    def id(self) -> GpuId:
        return self.gpu.id

    @property
    def why(self) -> str:
        """What occupies the gpu when no job of ours does."""
        return next(iter(self._reasons.values()), "")

    @property
    def is_quiet(self) -> bool:
        """Nothing of ours is under way here, and every end is recorded."""
        return self._holder is None and not self.ending

    def is_used(self, engine: EngineUrl) -> bool:
        """Tell whether a job, ours or a stranger's, is or may be on this engine of the gpu."""
        if f"stranger {engine}" in self._reasons:
            return True
        return self._holder is not None and (self.running is None or self.running.engine == engine)

    def own_jobs(self) -> frozenset[JobId]:
        return frozenset() if self.running is None else frozenset({self.running.job.id})

    def leased(self) -> tuple[Running, ...]:
        """Attempts whose leases the heartbeat renews."""
        return (*self.ending,) if self.running is None else (self.running, *self.ending)

    def cancel(self, job: JobId) -> None:
        """Interrupt exactly this job if it runs here."""
        for running in self.leased():
            if running.job.id == job:
                running.cancel()

    def over_unsent(self, job: JobId) -> None:
        """The queue has done with this job: what prepares it need not go on; one that was sent is let be."""
        if self.running is not None and self.running.job.id == job and self.running.started_at is None:
            self.running.cancel()

    # --- reasons: kept from the queue, with no attempt of ours on it

    def occupy(self, key: str, why: str) -> None:
        """Keep the gpu from the queue for a reason of its own; several may hold at once."""
        first = not self._reasons
        self._reasons[key] = why
        if first:
            self.parts.tell(GpuOccupied(gpu=self.id, why=why))

    def free(self, key: str) -> None:
        """End one reason; the last one gives the gpu back to the queue."""
        if self._reasons.pop(key, None) is None:
            return
        self._unlock()
        if not self._reasons:
            self.parts.tell(GpuFreed(gpu=self.id))

    def take_for(self, key: str, why: str) -> bool:
        """Occupy the gpu only if nothing holds it."""
        if self._holder is not None or self._reasons:
            return False
        self.occupy(key, why)
        return True

    def rest(self, why: str) -> None:
        """Leave the gpu alone for a moment; for longer each time, until something starts here."""
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        self.occupy("resting", f"could not start: {why}")
        self._rest_timer = asyncio.get_running_loop().call_later(self._rest_seconds, self.free, "resting")
        self._rest_seconds = min(self._rest_seconds * 2, REST_SECONDS_MAX)

    def has_started(self) -> None:
        """Nothing is in the way any more."""
        self._rest_seconds = REST_SECONDS

    # --- attempts: taken and left

    def begin(self, decision: StartAttempt) -> bool:
        """Carry a decision out in a task of its own. False: not now; the book is told, so that it asks no
        more.
        """
        if self.is_stopping:
            return False
        if self._holder is not None:
            # The queue has done with the attempt (cancelled, superseded), the card has not.
            self.occupy("ending", "an attempt that is over for the queue is still being ended")
            return False
        if self._reasons:
            self.parts.tell(GpuOccupied(gpu=self.id, why=self.why))
            return False
        attempt = Attempt(self, decision)
        self._take(attempt)
        self.parts.spawn(attempt.run())
        return True

    def adopt(self, running: Running) -> None:
        """Take the card for an attempt of an earlier boot."""
        self._take(running)
        self.running = running

    def enter(self, holder: object, running: Running) -> None:
        """Say which job the holder has claimed."""
        assert self._holder is holder, f"{running.job.id} enters {self.id}, which it does not hold"
        self.running = running

    def leave(self, holder: object) -> None:
        """Let go of the card; once only, and by its holder alone."""
        if self._holder is not holder:
            return
        self._holder = self.running = None
        self.occupancy += 1
        self.free("ending")
        self._unlock()

    def _take(self, holder: object) -> None:
        assert self._holder is None, f"two attempts on {self.id}"
        self._holder = holder
        self.occupancy += 1

    def _unlock(self) -> None:
        """Let other programs have the card, once nothing of ours is or may be on it."""
        if self.card_lock is not None and self._holder is None and not self._is_uncertain():
            self.card_lock.release()

    def _is_uncertain(self) -> bool:
        return any(key.startswith("recovering") for key in self._reasons)

    def note_end(self, failure: Failure | None) -> None:
        """Count how an attempt ended: a gpu on which whatever runs fails rests, and comes back slowly."""
        was_trying = self.breaker.is_trying
        pause = self.breaker.after(failure)
        if pause is None:
            if was_trying:
                self.parts.tell(GpuPaused(gpu=self.id, seconds=0.0))
            return
        _log.warning("gpu_paused", gpu=self.id, seconds=pause.seconds, failures=pause.failures)
        self.parts.tell(GpuPaused(gpu=self.id, seconds=pause.seconds, failures=pause.failures))

    def forgive(self) -> None:
        """Forget that attempts failed here: somebody has looked at it."""
        if self.breaker.is_trying:
            self.parts.tell(GpuPaused(gpu=self.id, seconds=0.0))
        self.breaker.reset()

    # --- its durable record, and its lease

    async def put_record(self, running: Running, stage: str, claim: ClaimId | None = None) -> None:
        """Note durably what occupies the card. Raises StoreError."""
        record = GpuRecord(
            gpu=self.id,
            job=running.job.id,
            token=running.token,
            claim=claim or claim_of(running.token),
            engine=running.engine,
            stage=stage,
            written_at=self.parts.wall(),
        )
        await self.parts.records.put_gpu_record(record)

    async def resume(self, running: Running) -> Code:
        """Go on with an attempt whose lease is over, under a new token. Raises StoreError: then ask again.

        The claim id is noted before asking, so that a crash in between can be told. An attempt that has left
        the card has no record any more: the next one's may be there.
        """
        parts = self.parts
        claim = running.resuming = running.resuming or parts.new_claim()
        if self.running is running:
            await self.put_record(running, "resuming", claim)
        lease = parts.lease
        reply = await parts.store.resume(
            lease.node, lease.boot, running.gpu, running.job.id, running.token, claim, lease.lease_seconds
        )
        running.resuming = None
        if reply.code is Code.OK and reply.token is not None:
            running.token = reply.token
            if self.running is running:
                await self.put_record(running, "running")
        return reply.code


def claim_of(token: Token) -> ClaimId:
    """The claim's part of a token, `<n>.<claim id>`."""
    return ClaimId(token.partition(".")[2])
