"""The end of an attempt: the gpu is left, the end recorded, and the gpu free once its engine is known idle.

What the engine and the user did is judged here; what follows a failure is `core.retry`'s to say. The end is
offered to the store until it is taken.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from gpulane.core.events import LoadMeasured, ModelSeen, ServiceMeasured
from gpulane.core.gpus import able_engines
from gpulane.core.model import (
    NO_MODEL,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    Job,
    JobState,
    Seconds,
    Token,
)
from gpulane.core.retry import OUT_OF_MEMORY, End, after_failure
from gpulane.core.retry import Again as RetryAgain
from gpulane.dispatcher.hung import HUNG
from gpulane.dispatcher.insist import insist, try_for
from gpulane.dispatcher.ports import GpuParts, Running
from gpulane.dispatcher.results import encode_result
from gpulane.engine.base import AnswerSink, Outcome, RecordedResult
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import Again, Code, JobRecord, Reply

if TYPE_CHECKING:
    from gpulane.dispatcher.gpu import GpuOwner

RECORD_KEPT_SECONDS: Final = 0.25
"""How long an idle gpu's record may outlive its attempt, so that the next one's takes its place: a write
less while an engine waits. A restart in between looks at the engine in vain."""

DROP_SECONDS: Final = 20.0
RESUMED_REST_SECONDS: Final = 0.05

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is told to the store."""

    failure: Failure | None
    again: RetryAgain | None


async def settle(
    owner: GpuOwner, holder: object, running: Running, record: JobRecord, outcome: Outcome
) -> None:
    """Leave the gpu, record how the attempt ended, and free the gpu once its engine is known idle."""
    parts, key = owner.parts, recovering(running)
    if not outcome.engine_idle:
        owner.occupy(key, "its engine does not answer; waiting until it is known idle")
    used = _used(running, outcome, parts.clock())
    try:
        _learn(parts, owner.id, running, outcome)
        parts.hub.forget(running.job.id)
    except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
        _log.exception("not_learned", job=running.job.id)
    # The card is left before the end is recorded: the store's event may give it its next job at once. Until
    # then the book holds it for this one.
    owner.ending.add(running)
    owner.leave(holder)
    if outcome.state is not JobState.CANCELLED:
        # Before the end is recorded: a paused gpu must not be given the next job by that very event.
        owner.note_end(outcome.failure)
    try:
        await _record_end(owner, running, record, outcome, used)
    except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
        _log.exception("end_not_recorded", job=running.job.id, gpu=owner.id)
        await _end_plainly(parts, running, used)
    finally:
        owner.ending.discard(running)
    _tell_end(owner, running, outcome)
    if outcome.failure is not None and outcome.failure.code == HUNG and not outcome.engine_idle:
        parts.spawn(_restart_hung(owner, running.engine))
    if outcome.engine_idle:
        await asyncio.sleep(RECORD_KEPT_SECONDS)
        await drop_record(parts, owner.id, running.token)
    else:
        parts.spawn(free_when_idle(owner, running))


async def _restart_hung(owner: GpuOwner, engine: EngineUrl) -> None:
    """Restart an engine that did not stop a hung job, where the settings say how; else it stays occupied."""
    if owner.handoff is not None:
        await owner.handoff.restart_hung(engine)


async def free_when_idle(owner: GpuOwner, running: Running) -> None:
    """End the occupancy of a gpu whose job is over, once its engine is known idle or gone."""
    await owner.watches[running.engine].until_idle()
    await drop_record(owner.parts, owner.id, running.token)
    owner.free(recovering(running))


async def drop_record(parts: GpuParts, gpu: GpuId, token: Token) -> None:
    """Note that a gpu is known idle. A record that stays behind costs a look at the engine after a
    restart.
    """
    drop = parts.records.drop_gpu_record
    await try_for(DROP_SECONDS, lambda: drop(gpu, token), "the drop of a gpu record")


def recovering(running: Running) -> str:
    """The key of the reason for which a gpu waits for the engine of this attempt."""
    return f"recovering {running.job.id}"


def _tell_end(owner: GpuOwner, running: Running, outcome: Outcome) -> None:
    _log.info(
        "attempt_ended",
        job=running.job.id,
        gpu=owner.id,
        engine=running.engine,
        state=str(outcome.state),
        code=outcome.failure.code if outcome.failure else None,
        service_seconds=round(outcome.service_seconds, 3),
    )


# --- what the store is told


async def _record_end(
    owner: GpuOwner, running: Running, record: JobRecord, outcome: Outcome, used: Seconds
) -> None:
    parts = owner.parts
    verdict = _verdict(owner, running, record, outcome)
    result = None if outcome.result is None else _placed(outcome.result, running.engine)
    while True:
        token = running.token
        reply = await insist(
            lambda: _tell(parts, running, outcome, verdict, used, result), "the end of an attempt"
        )
        if reply.code is not Code.STALE or (running.token == token and running.resuming is None):
            break
        await asyncio.sleep(RESUMED_REST_SECONDS)  # a resume under way took the token meanwhile
    if reply.code is Code.STALE:
        _log.warning("late_result", job=running.job.id, gpu=owner.id)
    elif verdict.again is None and result is not None and result.artifacts:
        parts.on_result(running.job.id, result)


async def _tell(
    parts: GpuParts,
    running: Running,
    outcome: Outcome,
    verdict: Verdict,
    used: Seconds,
    result: RecordedResult | None,
) -> Reply:
    job, token, again, failure = running.job.id, running.token, verdict.again, verdict.failure
    if again is not None:
        follows = Again(rest_seconds=again.rest_seconds, avoid=again.avoid, refund=again.refund)
        return await parts.store.fail(job, token, failure or _UNKNOWN, follows, used_seconds=used)
    return await parts.store.finish(
        job,
        token,
        state=outcome.state if failure is None else JobState.FAILED,
        failure=failure,
        used_seconds=used,
        result=encode_result(result),
    )


async def _end_plainly(parts: GpuParts, running: Running, used: Seconds) -> None:
    """End a job whose end could not even be put into words; what breaks here is left to the lease's end."""
    failure = Failure(
        kind=FailureKind.LOST, code="gateway_fault", message="a fault of the gateway; its log tells more"
    )

    try:
        await insist(
            lambda: parts.store.finish(
                running.job.id,
                running.token,
                state=JobState.FAILED,
                failure=failure,
                used_seconds=used,
                result=None,
            ),
            "the end of a broken attempt",
        )
    except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
        _log.exception("end_left_to_its_lease", job=running.job.id)


def _verdict(owner: GpuOwner, running: Running, record: JobRecord, outcome: Outcome) -> Verdict:
    """1. no failure  2. cancelled, or its client has been told something: the end  3. as the retry rules
    say.
    """
    failure = _judged(running, outcome)
    is_wanted = not (record.cancel_wanted or running.cancel_wanted)
    answer = running.context.answer if running.context is not None else None
    if failure is None or not is_wanted or not _may_repeat(answer):
        return Verdict(failure=failure, again=None)
    match _advise(owner, running, record, failure):
        case RetryAgain() as again:
            return Verdict(failure=failure, again=again)
        case End(failure=last):
            return Verdict(failure=last, again=None)


def _judged(running: Running, outcome: Outcome) -> Failure | None:
    """An interrupt that nobody asked for is a failed attempt, never a cancel."""
    if outcome.state is JobState.CANCELLED and not running.cancel_wanted:
        message = "the engine was interrupted by somebody else"
        return outcome.failure or Failure(kind=FailureKind.INTERRUPTED, code="interrupted", message=message)
    if outcome.state is JobState.FAILED:
        return outcome.failure or _UNKNOWN
    return None


def _may_repeat(answer: AnswerSink | None) -> bool:
    """A held call whose client has been told something already cannot begin anew."""
    return not isinstance(answer, HeldAnswer) or not (answer.status or answer.is_ended)


def _advise(owner: GpuOwner, running: Running, record: JobRecord, failure: Failure) -> RetryAgain | End:
    parts = owner.parts
    killed = sum(a.failure is not None and a.failure.killed_engine for a in record.attempts)
    return after_failure(
        running.job,
        failure,
        attempts_counted=running.attempts + 1,
        engine_kills_before=killed,
        out_of_memory_on=tuple(
            a.gpu for a in record.attempts if a.failure is not None and a.failure.code == OUT_OF_MEMORY
        ),
        avoid=record.avoid,
        gpu=owner.id,
        eligible=_eligible(parts, running.job),
        policy=parts.policy,
        jitter=parts.chance.random(),
    )


def _eligible(parts: GpuParts, job: Job) -> frozenset[GpuId]:
    key = parts.book.class_key(job)
    return frozenset(gpu for gpu, facts in parts.book.gpus.items() if able_engines(key, facts))


def _placed(result: RecordedResult, engine: EngineUrl) -> RecordedResult:
    return msgspec.structs.replace(result, engine=engine)


_UNKNOWN: Final = Failure(kind=FailureKind.ENGINE, code="unknown", message="the attempt failed")


# --- what is learned


def _used(running: Running, outcome: Outcome, now: Seconds) -> Seconds:
    used = outcome.service_seconds + (outcome.load_seconds or 0.0)
    if not used and running.started_at is not None:
        return max(0.0, now - running.started_at)
    return used


def _learn(parts: GpuParts, gpu: GpuId, running: Running, outcome: Outcome) -> None:
    succeeded = outcome.state is JobState.SUCCEEDED
    model = outcome.model or (running.job.model if succeeded else NO_MODEL)
    if model:
        parts.tell(ModelSeen(gpu=gpu, engine=running.engine, model=model))
    if outcome.load_seconds is not None and model:
        parts.tell(
            LoadMeasured(gpu=gpu, model=model, seconds=outcome.load_seconds, service=running.job.service)
        )
    if succeeded and outcome.service_seconds > 0:
        parts.tell(ServiceMeasured(job=running.job, gpu=gpu, seconds=outcome.service_seconds))
