"""The life of one gpu of this node: free, claiming, starting, running, finishing, free; or occupied by
something else.

The order that nothing may change: claim -> durable local record -> start -> first byte; and the record goes,
and the gpu is
free, only when its engines are known idle. This object alone begins work on the gpu: exclusivity does not
depend on the store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog

from gpulane.adapters.base import EngineRequest
from gpulane.core.book import Book
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    ClaimLost,
    GpuFreed,
    GpuOccupied,
    LoadMeasured,
    LocalEvent,
    ModelSeen,
    ServiceMeasured,
)
from gpulane.core.gpus import able_engines
from gpulane.core.model import (
    NO_MODEL,
    ClaimId,
    EngineUrl,
    Failure,
    FailureKind,
    Gpu,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Token,
)
from gpulane.core.policy import Policy
from gpulane.core.retry import Again as RetryAgain
from gpulane.core.retry import End, after_failure
from gpulane.dispatcher.results import encode_result
from gpulane.engine.base import AnswerSink, AttemptContext, Found, Outcome, RecordedResult, ServiceClient
from gpulane.engine.probe import EngineWatch
from gpulane.engine.progress import ProgressHub
from gpulane.errors import EngineError, StoreError
from gpulane.store.base import Again, ClaimCandidate, ClaimRequest, Code, JobRecord, Reply, Store
from gpulane.store.node import GpuRecord, NodeStore

REST_AFTER_REFUSAL_SECONDS: Final = 1.0
"""How long a gpu is left alone after a claim was refused for its own sake."""
STORE_RETRY_SECONDS_MAX: Final = 5.0
"""The slowest that an end is offered to a store that does not take it."""
REST_BEFORE_RELEASED_SECONDS: Final = 0.5
RECORD_KEPT_SECONDS: Final = 0.25
"""How long an idle gpu's record may outlive its attempt; a restart in between only looks at the engine in vain."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What a job sends, and where its answer goes."""

    request: EngineRequest
    meta: bytes
    answer: AnswerSink | None


class Payloads(Protocol):
    """Finds what a claimed job sends; None when it is gone (a held job of an earlier boot)."""

    async def payload(self, record: JobRecord) -> Payload | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLease:
    """Under which name this process holds leases."""

    node: NodeId
    boot: int
    lease_seconds: Seconds


@dataclass(slots=True, kw_only=True)
class Running:
    """The attempt under way on a gpu."""

    job: Job
    token: Token
    engine: EngineUrl
    attempts: int
    context: AttemptContext | None = None
    started_at: float = 0.0
    cancel_wanted: bool = False


class GpuOwner:
    """Begins, follows and ends everything on one gpu."""

    def __init__(
        self,
        gpu: Gpu,
        *,
        lease: NodeLease,
        store: Store,
        node_store: NodeStore,
        clients: Mapping[EngineUrl, ServiceClient],
        payloads: Payloads,
        hub: ProgressHub,
        tell: Callable[[LocalEvent], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
        book: Book,
        policy: Policy,
        on_result: Callable[[JobId, RecordedResult], None],
        new_claim: Callable[[], ClaimId],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.gpu = gpu
        self.running: Running | None = None
        self.watches: dict[EngineUrl, EngineWatch] = {}
        self.occupancy = 0
        """Rises by one at the beginning and at the end of each occupancy by us: odd while we occupy the
        gpu."""
        self._lease = lease
        self._store = store
        self._node_store = node_store
        self._clients = clients
        self._payloads = payloads
        self._hub = hub
        self._tell = tell
        self._spawn = spawn
        self._book = book
        self._policy = policy
        self._on_result = on_result
        self._new_claim = new_claim
        self._clock = clock
        self._wall = wall
        self._reasons: dict[str, str] = {}
        self._random = random.Random()

    # --- what others ask

    @property
    def id(self) -> GpuId:
        return self.gpu.id

    @property
    def why(self) -> str:
        """What occupies the gpu when no job of ours does."""
        return next(iter(self._reasons.values()), "")

    def own_jobs(self) -> frozenset[JobId]:
        return frozenset() if self.running is None else frozenset({self.running.job.id})

    def lease_pair(self) -> tuple[JobId, Token] | None:
        """What the heartbeat renews."""
        return None if self.running is None else (self.running.job.id, self.running.token)

    def occupy(self, key: str, why: str) -> None:
        """Keep the gpu from the queue for a reason of its own; several may hold at once."""
        first = not self._reasons
        self._reasons[key] = why
        if first:
            self._tell(GpuOccupied(gpu=self.id, why=why))

    def free(self, key: str) -> None:
        """End one reason; the last one gives the gpu back to the queue."""
        if self._reasons.pop(key, None) is not None and not self._reasons:
            self._tell(GpuFreed(gpu=self.id))

    def cancel(self, job: JobId) -> None:
        """Interrupt exactly this job if it runs here."""
        if self.running is not None and self.running.job.id == job:
            self.running.cancel_wanted = True
            if self.running.context is not None:
                self.running.context.cancel_wanted.set()

    # --- one attempt

    def begin(self, decision: StartAttempt) -> bool:
        """Carry a decision out in a task of its own. False: not now (something of ours is still there)."""
        if self.running is not None or self._reasons:
            return False
        self._spawn(self._attempt(decision))
        return True

    async def _attempt(self, decision: StartAttempt) -> None:
        claimed = await self._claim(decision)
        if claimed is None:
            return
        job_id, token = claimed
        record = await self._record(job_id)
        payload = None if record is None else await self._payload(record)
        if record is None or payload is None or record.engine is None:
            failure = Failure(
                kind=FailureKind.LOST, code="client_gone", message="its client and its body are gone"
            )
            await self._store.cancel(job_id, failure)
            return
        running = Running(job=record.job, token=token, engine=record.engine, attempts=record.attempts_counted)
        self._enter(running)
        context = AttemptContext(
            job=record.job, request=payload.request, meta=payload.meta, hub=self._hub, answer=payload.answer
        )
        outcome = await self._start_and_run(running, context)
        if outcome is not None:
            await self.settle(running, record, outcome)

    async def _claim(self, decision: StartAttempt) -> tuple[JobId, Token] | None:
        request = ClaimRequest(
            node=self._lease.node,
            boot=self._lease.boot,
            gpu=self.id,
            claim=self._new_claim(),
            lease_seconds=self._lease.lease_seconds,
            candidates=tuple(
                ClaimCandidate(
                    job=c.job,
                    engine=c.engine,
                    charge_seconds=c.charge.total,
                    # Proposed although it failed here: no other gpu is eligible now.
                    despite_avoid=self._is_avoided_by(c.job),
                )
                for c in decision.candidates
            ),
            lowest_f=decision.lowest_f,
        )
        try:
            reply = await self._store.claim(request)
        except StoreError as error:
            _log.error("claim_failed", gpu=self.id, why=error.message)
            self._tell(ClaimLost(gpu=self.id, rest_seconds=REST_AFTER_REFUSAL_SECONDS))
            return None
        if reply.code is Code.OK and reply.job is not None and reply.token is not None:
            rule = next((c.rule for c in decision.candidates if c.job == reply.job), "")
            _log.info("attempt_claimed", job=reply.job, gpu=self.id, rule=rule)
            return reply.job, reply.token
        if (
            reply.code is Code.BUSY
            and reply.job is not None
            and reply.token is not None
            and self.running is None
        ):
            # The slot is held by something that this process knows nothing of (fleet.md 4, claim).
            await self._store.release(reply.job, reply.token, "unknown to its own node")
        rest = 0.0 if reply.code is Code.LOST else REST_AFTER_REFUSAL_SECONDS
        self._tell(ClaimLost(gpu=self.id, rest_seconds=rest))
        return None

    async def _start_and_run(self, running: Running, context: AttemptContext) -> Outcome | None:
        """Steps 4 and 5 of the life: nothing is sent before `start` is OK. None when the attempt never
        began.
        """
        client = self._clients[running.engine]
        blocked = await self._blocked_by(client)
        if blocked is not None:
            await self._give_back(running, blocked)
            return None
        if running.attempts > 0:
            # An older record of the same id in this engine would be taken for this attempt's (fleet.md 12,
            # case 5).
            try:
                found = await client.find(running.job.id)
                if found in {Found.SUCCEEDED, Found.FAILED, Found.INTERRUPTED}:
                    await client.erase(running.job.id)
            except EngineError as error:
                await self._give_back(running, f"cannot be asked for older records: {error.message}")
                return None
        try:
            await self._node_store.put_gpu_record(self._gpu_record(running))
            reply = await self._store.start(running.job.id, running.token)
        except StoreError as error:
            _log.error("start_failed", job=running.job.id, gpu=self.id, why=error.message)
            await self._give_back(running, "the store failed")
            return None
        if reply.code is not Code.OK:
            if reply.code is Code.EXPIRED:
                await self._give_back(running, "its lease was over before it began")
            else:
                self._leave(running)
                self._tell(ClaimLost(gpu=self.id))
            return None
        running.context = context
        running.started_at = self._clock()
        if running.cancel_wanted:
            context.cancel_wanted.set()
        return await client.run(context)

    async def settle(self, running: Running, record: JobRecord, outcome: Outcome) -> None:
        """Record how the attempt ended, and free the gpu once its engine is known idle."""
        if not outcome.engine_idle:
            self.occupy("recovering", "its engine does not answer; waiting until it is known idle")
        self._learn(running, outcome)
        used = outcome.service_seconds + (outcome.load_seconds or 0.0)
        if not used and running.started_at:
            used = self._clock() - running.started_at
        self._hub.forget(running.job.id)
        answer = running.context.answer if running.context is not None else None
        self._leave(running)
        await self._record_end(running, record, outcome, used, answer)
        _log.info(
            "attempt_ended",
            job=running.job.id,
            gpu=self.id,
            engine=running.engine,
            state=str(outcome.state),
            code=outcome.failure.code if outcome.failure else None,
            service_seconds=round(outcome.service_seconds, 3),
        )
        if outcome.engine_idle:
            # The next attempt's record takes this one's place: a write less while an engine waits.
            await asyncio.sleep(RECORD_KEPT_SECONDS)
            await self._drop_record(running.token)
        else:
            self._spawn(self._free_when_idle(running))

    async def _record_end(
        self, running: Running, record: JobRecord, outcome: Outcome, used: Seconds, answer: AnswerSink | None
    ) -> None:
        """Offer the end to the store until it is taken: nothing else may free the job."""
        failure = self._judged(running, outcome)
        again = None
        if (
            failure is not None
            and not (record.cancel_wanted or running.cancel_wanted)
            and self._may_repeat(answer)
        ):
            again = self._advise(running, record, failure)
        pause = 0.05
        while True:
            try:
                if isinstance(again, RetryAgain):
                    reply = await self._store.fail(
                        running.job.id,
                        running.token,
                        failure or _UNKNOWN,
                        Again(rest_seconds=again.rest_seconds, avoid=again.avoid, refund=again.refund),
                        used_seconds=used,
                    )
                else:
                    ended_by = again.failure if isinstance(again, End) else failure
                    reply = await self._finish(running, outcome, ended_by, used)
                break
            except StoreError as error:
                _log.error("end_not_recorded", job=running.job.id, gpu=self.id, why=error.message)
                await asyncio.sleep(pause)
                pause = min(pause * 2, STORE_RETRY_SECONDS_MAX)
        if reply.code is Code.STALE:
            _log.warning("late_result", job=running.job.id, gpu=self.id)
        elif not isinstance(again, RetryAgain):
            result = _placed(outcome, running.engine)
            if result is not None and result.artifacts:
                self._on_result(running.job.id, result)

    async def _finish(
        self, running: Running, outcome: Outcome, failure: Failure | None, used: Seconds
    ) -> Reply:
        return await self._store.finish(
            running.job.id,
            running.token,
            state=outcome.state if failure is None else JobState.FAILED,
            failure=failure,
            used_seconds=used,
            result=encode_result(_placed(outcome, running.engine)),
        )

    def _judged(self, running: Running, outcome: Outcome) -> Failure | None:
        """An interrupt that nobody asked for is a failed attempt, never a cancel."""
        if outcome.state is JobState.CANCELLED and not running.cancel_wanted:
            message = "the engine was interrupted by somebody else"
            return outcome.failure or Failure(
                kind=FailureKind.INTERRUPTED, code="interrupted", message=message
            )
        return outcome.failure if outcome.state is JobState.FAILED else None

    def _may_repeat(self, answer: AnswerSink | None) -> bool:
        """A held call whose client has been told something already cannot begin anew."""
        return answer is None or not getattr(answer, "status", 0)

    def _advise(self, running: Running, record: JobRecord, failure: Failure) -> RetryAgain | End:
        killed = sum(a.failure is not None and a.failure.killed_engine for a in record.attempts)
        return after_failure(
            running.job,
            failure,
            attempts_counted=running.attempts + 1,
            engine_kills_before=killed,
            avoid=record.avoid,
            gpu=self.id,
            eligible=self._eligible(running.job),
            policy=self._policy,
            jitter=self._random.random(),
        )

    def _is_avoided_by(self, job: JobId) -> bool:
        entry = self._book.waiting.entries.get(job)
        return entry is not None and self.id in entry.avoid

    def _eligible(self, job: Job) -> frozenset[GpuId]:
        key = self._book.class_key(job)
        return frozenset(gpu for gpu, facts in self._book.gpus.items() if able_engines(key, facts))

    # --- entering and leaving

    def _enter(self, running: Running) -> None:
        assert self.running is None, f"two jobs on {self.id}: {self.running} and {running.job.id}"
        self.running = running
        self.occupancy += 1

    def _leave(self, running: Running) -> None:
        if self.running is running:
            self.running = None
            self.occupancy += 1

    async def _give_back(self, running: Running, why: str) -> None:
        """Release a claim that was not started; the job keeps its place."""
        _log.info("attempt_released", job=running.job.id, gpu=self.id, why=why)
        self._leave(running)
        self._hold_back()
        try:
            await self._store.release(running.job.id, running.token, why)
            await self._drop_record(running.token)
        except StoreError as error:
            _log.error("release_failed", job=running.job.id, gpu=self.id, why=error.message)

    def _hold_back(self) -> None:
        """Rest a moment: what was in the way will hardly be gone at once."""
        self.occupy("resting", "could not start; resting a moment")
        asyncio.get_running_loop().call_later(REST_BEFORE_RELEASED_SECONDS, self.free, "resting")

    async def _blocked_by(self, target: ServiceClient) -> str | None:
        """Tell what keeps the card busy behind our back; None when every engine on it is known idle."""
        others = [self._clients[engine.url] for engine in self.gpu.engines if engine.url != target.url]
        for client in (target, *others):
            idle = client.known_idle()
            if idle is None:
                try:
                    idle = (await client.probe(self.own_jobs())).idle
                except EngineError as error:
                    if client is target:
                        self._look_soon(client.url)
                        return f"{client.url} does not answer: {error.message}"
                    continue  # it had nothing of ours, and its watch says whether it is lost
            if not idle:
                self._look_soon(client.url)
                return f"{client.url} is busy with work that did not come through here"
        return None

    def _look_soon(self, engine: EngineUrl) -> None:
        if engine in self.watches:
            self.watches[engine].look_soon()

    async def _free_when_idle(self, running: Running) -> None:
        await self.watches[running.engine].until_idle()
        await self._drop_record(running.token)
        self.free("recovering")

    # --- records and what is learned

    def _gpu_record(self, running: Running) -> GpuRecord:
        return GpuRecord(
            gpu=self.id,
            job=running.job.id,
            token=running.token,
            claim=claim_of(running.token),
            engine=running.engine,
            stage="starting",
            written_at=self._wall(),
        )

    async def _drop_record(self, token: Token) -> None:
        try:
            await self._node_store.drop_gpu_record(self.id, token)
        except StoreError as error:
            _log.error("gpu_record_not_dropped", gpu=self.id, why=error.message)

    async def _record(self, job: JobId) -> JobRecord | None:
        try:
            return await self._store.job(job)
        except StoreError as error:
            _log.error("record_not_read", job=job, why=error.message)
            return None

    async def _payload(self, record: JobRecord) -> Payload | None:
        try:
            return await self._payloads.payload(record)
        except StoreError as error:
            _log.error("body_not_read", job=record.job.id, why=error.message)
            return None

    def _learn(self, running: Running, outcome: Outcome) -> None:
        model = outcome.model or (running.job.model if outcome.state is JobState.SUCCEEDED else NO_MODEL)
        if model:
            self._tell(ModelSeen(gpu=self.id, engine=running.engine, model=model))
        if outcome.load_seconds is not None and model:
            self._tell(
                LoadMeasured(
                    gpu=self.id, model=model, seconds=outcome.load_seconds, service=running.job.service
                )
            )
        if outcome.state is JobState.SUCCEEDED and outcome.service_seconds > 0:
            self._tell(ServiceMeasured(job=running.job, gpu=self.id, seconds=outcome.service_seconds))


def claim_of(token: Token) -> ClaimId:
    """The claim's part of a token, `<n>.<claim id>`."""
    return ClaimId(token.partition(".")[2])


def _placed(outcome: Outcome, engine: EngineUrl) -> RecordedResult | None:
    return None if outcome.result is None else msgspec.structs.replace(outcome.result, engine=engine)


_UNKNOWN: Final = Failure(kind=FailureKind.ENGINE, code="unknown", message="the attempt failed")
