"""How jobs come in: admitted, stored, and, for calls whose clients wait, held. And where their payloads are
until they are sent.

A job is durable before its client hears so; a call is known here before its job is in the store, so that no
event of it is missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from gpulane.adapters.base import EngineRequest, decode_request, encode_request
from gpulane.config import Settings
from gpulane.core.admission import Refused, admit
from gpulane.core.book import Book
from gpulane.core.model import JobId, Service
from gpulane.dispatcher.held import Held, HeldCalls
from gpulane.dispatcher.ports import Payload
from gpulane.errors import Conflict, Impossible, StoreError, Throttled, Unavailable
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import Code, JobRecord, NewJob, QueueLimits, Reply, Store
from gpulane.views import HeldCall

RECENT_BODIES_BYTES_MAX: Final = 64 * 1024**2
"""Bodies of jobs submitted here stay in memory until claimed, up to this much: they need not be read back."""


class Intake:
    """One per process."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        book: Book,
        held: HeldCalls,
        spool: Path,
        holder: str,
        describe_soon: Callable[[Service], None],
    ) -> None:
        """`holder` names this process as the one whose clients wait; `describe_soon` has a service's engines
        tell anew what they offer.
        """
        self.is_open = False
        self._settings = settings
        self._store = store
        self._book = book
        self._held = held
        self._spool = spool
        self._holder = holder
        self._describe_soon = describe_soon
        self._recent: dict[JobId, Payload] = {}
        self._recent_bytes = 0
        self._limits = QueueLimits(
            queued_max=settings.limits.queued_max,
            queued_per_account_max=settings.limits.queued_per_account_max,
        )

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        """Admit and store a job; durable on return."""
        self._check_open()
        known = await self._known(new)
        if known is not None:
            return known
        self._admit(new)
        stored = replace(new, body=encode_request(request))
        self._remember(new, request)
        try:
            reply = await self._store.enqueue(stored, self._limits)
        except BaseException:
            self.forget(new.job.id)
            raise
        if reply.code is not Code.OK:
            self.forget(new.job.id)
        return _judged(reply)

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        """Admit a job whose client waits; an identical call whose client left is joined."""
        self._check_open()
        joined = self._held.join(new.job.account, new.job.service, new.digest)
        if joined is not None:
            return HeldCall(job=joined.job.id, answer=joined.answer, joined=True)
        if len(self._held) >= self._settings.limits.held_max:
            raise Throttled("too many requests wait for their answer already", retry_after_seconds=10)
        self._admit(new)
        job = replace(new.job, held=True, holder=self._holder)
        held = Held(job=job, request=request, meta=new.meta, answer=self._answer(), digest=new.digest)
        self._held.add(held)
        try:
            reply = _judged(await self._store.enqueue(replace(new, job=job), self._limits))
        except BaseException:
            self._held.drop(job.id)
            raise
        if reply.code is Code.EXISTS and reply.job != job.id:
            self._held.drop(job.id)
            return self._joined(reply)
        return HeldCall(job=job.id, answer=held.answer)

    def forget(self, job: JobId) -> None:
        """Drop a body that is not needed in memory any more."""
        payload = self._recent.pop(job, None)
        if payload is not None:
            self._recent_bytes -= len(payload.request.body)

    async def payload(self, record: JobRecord) -> Payload | None:
        """What a claimed job sends, and where its answer goes."""
        held = self._held.get(record.job.id)
        if held is not None:
            return Payload(request=held.request, meta=held.meta, answer=held.answer)
        if record.job.held:
            return None
        recent = self._recent.get(record.job.id)
        if recent is not None:
            return recent
        stored = await self._store.body(record.job.id)
        if stored is None:
            return None
        return Payload(request=decode_request(stored), meta=record.meta, answer=None)

    # --- inside

    def _check_open(self) -> None:
        if not self.is_open:
            raise Unavailable("gpulane is stopping and takes no new jobs", retry_after_seconds=5)

    async def _known(self, new: NewJob) -> Reply | None:
        """A repeated submission is answered as the first, even when it could not be admitted now."""
        if new.client_job_id is None:
            return None
        record = await self._store.job_of_client(new.job.account, new.job.service, new.client_job_id)
        if record is None:
            return None
        # The store compares the content; admission would only be in the way.
        return _judged(await self._store.enqueue(new, self._limits))

    def _admit(self, new: NewJob) -> None:
        answer = admit(self._book, new.job)
        if not isinstance(answer, Refused):
            return
        reason = answer.reason
        hint = "; ".join(each.text for each in answer.per_gpu) or None
        if reason.code in {"queue_full", "account_full"}:
            raise Throttled(reason.text, hint=hint, code=reason.code, retry_after_seconds=5)
        # What is refused now may have been put on the engine's disk a moment ago.
        self._describe_soon(new.job.service)
        raise Impossible(reason.text, hint=hint, code=reason.code)

    def _joined(self, reply: Reply) -> HeldCall:
        """The store knows this call by a name of its client's: it is that call, if anybody still holds it."""
        held = None if reply.job is None else self._held.join_open(reply.job)
        if held is None:
            raise Conflict("this id names a call that has ended; take a new one", code="call_ended")
        return HeldCall(job=held.job.id, answer=held.answer, joined=True)

    def _answer(self) -> HeldAnswer:
        limits = self._settings.limits
        return HeldAnswer(
            self._spool,
            bytes_max=int(limits.answer_mib * 1024**2),
            memory_bytes_max=int(limits.answer_memory_mib * 1024**2),
        )

    def _remember(self, new: NewJob, request: EngineRequest) -> None:
        self.forget(new.job.id)
        self._recent[new.job.id] = Payload(request=request, meta=new.meta, answer=None)
        self._recent_bytes += len(request.body)
        while self._recent_bytes > RECENT_BODIES_BYTES_MAX:
            self.forget(next(iter(self._recent)))


def _judged(reply: Reply) -> Reply:
    match reply.code:
        case Code.OK | Code.EXISTS:
            return reply
        case Code.CONFLICT:
            raise Conflict("this id was used before with other content; take a new one")
        case Code.FULL:
            raise Throttled("the queue is full", retry_after_seconds=30)
        case Code.ACCOUNT_FULL:
            raise Throttled("you have too many jobs waiting", code="account_full", retry_after_seconds=30)
        case _:
            raise StoreError(f"enqueue was answered {reply.code}")
