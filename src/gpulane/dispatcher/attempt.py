"""One attempt, from the decision to its outcome.

The order that nothing may change: claim -> durable local record -> start -> first byte. Whatever breaks in
here is an outcome of this attempt: it ends neither the process nor the use of the gpu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from gpulane.core.decisions import StartAttempt
from gpulane.core.events import ClaimLost
from gpulane.core.model import EngineState, Failure, FailureKind, GpuId, JobId, JobState, Token
from gpulane.core.retry import OUT_OF_MEMORY
from gpulane.dispatcher.ending import drop_record, settle
from gpulane.dispatcher.hung import run_watched
from gpulane.dispatcher.insist import try_for
from gpulane.dispatcher.ports import Payload, Running
from gpulane.engine.base import AttemptContext, Found, Outcome, ServiceClient, is_refused
from gpulane.errors import EngineError, StoreError
from gpulane.store.base import Again, ClaimCandidate, ClaimRequest, Code, JobRecord

if TYPE_CHECKING:
    from gpulane.dispatcher.gpu import GpuOwner

REST_AFTER_REFUSAL_SECONDS: Final = 1.0
"""How long a gpu is left alone after a claim was refused for its own sake."""
TRY_SECONDS: Final = 20.0
"""How long the store is asked for one thing before the attempt is given up; well within a lease."""

_log = structlog.stdlib.get_logger(__name__)


class Attempt:
    """Holds its gpu from the moment it is made until `run` has let go of it."""

    def __init__(self, owner: GpuOwner, decision: StartAttempt) -> None:
        self._owner = owner
        self._parts = owner.parts
        self._decision = decision
        self._claimed: tuple[JobId, Token] | None = None
        self._is_started = False

    async def run(self) -> None:
        """Carry the decision out to its end."""
        try:
            await self._run()
        except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
            # A fault of ours in one attempt must not end the others, nor the process they live in.
            _log.exception("attempt_broke", gpu=self._owner.id, claimed=self._claimed)
            if self._claimed is not None and not self._is_started:
                await self._give_back(*self._claimed, "a fault of the gateway; the log tells")
        finally:
            self._owner.leave(self)

    async def _run(self) -> None:
        self._claimed = await self._claim()
        if self._claimed is None:
            return None
        job, token = self._claimed
        try:
            record = await self._parts.store.job(job)
        except StoreError as error:
            return await self._give_back(job, token, f"its record cannot be read: {error.message}")
        if record is None or record.engine is None or record.token != token:
            return None  # cancelled meanwhile
        running = Running(
            job=record.job,
            gpu=self._owner.id,
            token=token,
            engine=record.engine,
            attempts=record.attempts_counted,
        )
        self._owner.enter(self, running)
        try:
            payload = await self._parts.payloads.payload(record)
        except StoreError as error:
            return await self._give_back(job, token, f"its body cannot be read: {error.message}")
        except Exception as error:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("body_unreadable", job=job)
            return await self._end_unsent(running, record, f"its body cannot be read: {error!r}")
        if payload is None:
            return await self._end_bodiless(running, record)
        is_clear = await self._is_clear(running) and await self._is_handed_over(running, record)
        if is_clear and await self._start(running):
            await self._send(running, record, payload)
        return None

    # --- claim

    async def _claim(self) -> tuple[JobId, Token] | None:
        """Ask for one claim until it is answered: a second one in between could leave the first behind."""
        owner, parts, decision = self._owner, self._parts, self._decision
        request = ClaimRequest(
            node=parts.lease.node,
            boot=parts.lease.boot,
            gpu=owner.id,
            claim=parts.new_claim(),
            lease_seconds=parts.lease.lease_seconds,
            candidates=tuple(
                ClaimCandidate(
                    job=c.job,
                    engine=c.engine,
                    charge_seconds=c.charge.total,
                    despite_avoid=c.despite_avoid,
                )
                for c in decision.candidates
            ),
            lowest_f=decision.lowest_f,
        )
        reply = await try_for(TRY_SECONDS, lambda: parts.store.claim(request), "claim")
        if reply is not None and reply.code is Code.OK and reply.job is not None and reply.token is not None:
            rule = next((c.rule for c in decision.candidates if c.job == reply.job), "")
            _log.info("attempt_claimed", job=reply.job, gpu=owner.id, rule=rule)
            return reply.job, reply.token
        if (
            reply is not None
            and reply.code is Code.BUSY
            and reply.job is not None
            and reply.token is not None
        ):
            await self._clear_slot(reply.job, reply.token)
        rest = 0.0 if reply is not None and reply.code is Code.LOST else REST_AFTER_REFUSAL_SECONDS
        parts.tell(ClaimLost(gpu=owner.id, rest_seconds=rest))
        return None

    async def _clear_slot(self, job: JobId, token: Token) -> None:
        """The slot is held by something that this process knows nothing of (fleet.md 4, claim)."""
        if all(running.token != token for running in self._owner.leased()):
            await self._release(job, token, "unknown to its own node")

    # --- before the first byte

    async def _is_clear(self, running: Running) -> bool:
        """See that nothing is in the way; else the job goes back to its place."""
        client = self._parts.clients[running.engine]
        blocked = await self._blocked_by(client)
        if blocked is None and running.attempts > 0:
            # An older record of the same id in this engine would be taken for this attempt's (fleet.md 12,
            # case 5).
            blocked = await _erase_older(client, running.job.id)
        if blocked is None and self._owner.is_stopping:
            blocked = "the gateway is stopping"
        if blocked is not None:
            await self._give_back(running.job.id, running.token, blocked)
        return blocked is None

    async def _blocked_by(self, target: ServiceClient) -> str | None:
        """Tell what keeps the card busy behind our back; None when every engine on it is known idle."""
        owner, clients = self._owner, self._parts.clients
        others = [clients[engine.url] for engine in owner.gpu.engines if engine.url != target.url]
        for client in (target, *others):
            if owner.watches[client.url].state is EngineState.STOPPED:
                continue  # on purpose: nothing runs in it, and a hand-off starts it again
            idle = client.known_idle()
            if idle is None:
                try:
                    idle = (await client.probe(owner.own_jobs())).idle
                except EngineError as error:
                    owner.watches[client.url].look_soon()
                    if client is target or self._may_be_busy(client, error):
                        return f"{client.url} does not answer: {error.message}"
                    continue
            if not idle:
                owner.watches[client.url].look_soon()
                return f"{client.url} is busy with work that did not come through here"
        return None

    async def _is_handed_over(self, running: Running, record: JobRecord) -> bool:
        """Take the card's lock file and make room on the card; else the job goes back to its place."""
        owner = self._owner
        blocked = None
        if owner.card_lock is not None:
            held_by = await owner.card_lock.acquire(running.job)
            blocked = held_by
        if blocked is None and owner.handoff is not None:
            full = _ran_out_of_memory(record, owner.id)
            blocked = await owner.handoff.clear(
                running.job,
                running.engine,
                unload_all=full,
                is_wanted=lambda: not (running.cancel_wanted or owner.is_stopping),
            )
        if blocked is None and owner.is_stopping:
            blocked = "the gateway is stopping"
        if blocked is not None:
            await self._give_back(running.job.id, running.token, blocked)
        return blocked is None

    def _may_be_busy(self, other: ServiceClient, error: EngineError) -> bool:
        """Silence of another engine of the card proves nothing, until its watch has given it up as lost."""
        return not is_refused(error) and self._owner.watches[other.url].state is EngineState.READY

    async def _start(self, running: Running) -> bool:
        """Write the record, then start. Nothing may be sent before this is True."""
        job = running.job.id
        try:
            await self._owner.put_record(running, "starting")
        except StoreError as error:
            await self._give_back(job, running.token, f"the gpu's record cannot be written: {error.message}")
            return False
        reply = await try_for(TRY_SECONDS, lambda: self._parts.store.start(job, running.token), "start")
        if reply is not None and reply.code is Code.OK:
            self._owner.has_started()
            return True
        if reply is None or reply.code is Code.EXPIRED:
            await self._give_back(job, running.token, "it could not be started in time")
        await drop_record(self._parts, self._owner.id, running.token)
        return False

    # --- the first byte and all others

    async def _send(self, running: Running, record: JobRecord, payload: Payload) -> None:
        self._is_started = True
        running.started_at = self._parts.clock()
        context = AttemptContext(
            job=record.job,
            request=payload.request,
            meta=payload.meta,
            hub=self._parts.hub,
            answer=payload.answer,
        )
        running.enter(context)
        try:
            outcome = await run_watched(
                self._parts.clients[running.engine],
                context,
                self._owner.id,
                hub=self._parts.hub,
                learned=self._parts.book.learned,
                speed=self._owner.gpu.speed,
                patience=self._parts.patience,
                clock=self._parts.clock,
                is_cancel_wanted=lambda: running.cancel_wanted,
            )
        except Exception as error:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("engine_client_broke", job=running.job.id, engine=running.engine)
            outcome = broken(error)
        if self._owner.handoff is not None and outcome.state is JobState.SUCCEEDED:
            await self._owner.handoff.learn_peak(running.job, running.engine)
        await settle(self._owner, self, running, record, outcome)

    # --- attempts that never send anything

    async def _end_bodiless(self, running: Running, record: JobRecord) -> None:
        """A held call that nobody holds is over; a stored job without its body is a loss, and says so."""
        if not record.job.held:
            return await self._end_unsent(running, record, "its body is gone from the store")
        failure = Failure(
            kind=FailureKind.LOST, code="client_gone", message="its client and its body are gone"
        )
        cancel = self._parts.store.cancel
        await try_for(TRY_SECONDS, lambda: cancel(record.job.id, failure), "cancel")
        return None

    async def _end_unsent(self, running: Running, record: JobRecord, why: str) -> None:
        """End a job that cannot be sent at all: started, so that its end is one of a counted attempt."""
        if await self._start(running):
            self._is_started = True
            failure = Failure(kind=FailureKind.CLIENT, code="body_lost", message=why)
            await settle(self._owner, self, running, record, Outcome(state=JobState.FAILED, failure=failure))

    async def _give_back(self, job: JobId, token: Token, why: str) -> None:
        """Return a claim that was not started: the job keeps its place, and the gpu rests a moment."""
        _log.info("attempt_released", job=job, gpu=self._owner.id, why=why)
        self._owner.rest(why)
        self._owner.leave(self)
        await self._release(job, token, why)
        await drop_record(self._parts, self._owner.id, token)

    async def _release(self, job: JobId, token: Token, why: str) -> None:
        """What the store does not take now, its lease gives back later."""
        store = self._parts.store
        reply = await try_for(TRY_SECONDS, lambda: store.release(job, token, why), "release")
        if reply is not None and reply.code is Code.STALE:
            # Started after all, though nobody told us: nothing was sent.
            failure = Failure(kind=FailureKind.NOT_STARTED, code="not_sent", message=why)
            again = Again(rest_seconds=0.0, avoid=frozenset(), refund=True)
            fail = store.fail
            await try_for(TRY_SECONDS, lambda: fail(job, token, failure, again, used_seconds=0.0), "fail")


def broken(error: Exception) -> Outcome:
    """Judge an attempt that ended by a fault of ours: nobody knows what its engine does."""
    message = f"a fault of the gateway: {type(error).__name__}; its log tells more"
    failure = Failure(kind=FailureKind.LOST, code="gateway_fault", message=message)
    return Outcome(state=JobState.FAILED, failure=failure, engine_idle=False)


def _ran_out_of_memory(record: JobRecord, gpu: GpuId) -> bool:
    """Tell whether an earlier attempt needed more of this card than others had left it."""
    codes = {a.failure.code for a in record.attempts if a.gpu == gpu and a.failure is not None}
    return OUT_OF_MEMORY in codes


async def _erase_older(client: ServiceClient, job: JobId) -> str | None:
    try:
        found = await client.find(job)
        if found in {Found.SUCCEEDED, Found.FAILED, Found.INTERRUPTED}:
            await client.erase(job)
    except EngineError as error:
        return f"{client.url} cannot be asked for older records: {error.message}"
    return None
