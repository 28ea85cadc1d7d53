"""The verbs of a job's life: compare, change, append one event, reply. Each checks everything before it
changes anything.

Synchronous and complete in themselves, over tables in memory: what is not refused here, a shell must make
durable before it lets anybody see the reply or the event.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from gpulane.core.events import (
    AttemptFailed,
    AttemptResumed,
    CancelWanted,
    JobClaimed,
    JobPrioritised,
    JobReleased,
    JobStarted,
    JobSubmitted,
)
from gpulane.core.model import (
    ENDED,
    AttemptState,
    Band,
    ClaimId,
    Failure,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Token,
)
from gpulane.store.base import Again, ClaimCandidate, ClaimRequest, Code, NewJob, QueueLimits, Reply
from gpulane.store.records import ATTEMPTS_KEPT, Attempt, Node, Row
from gpulane.store.tables import Tables

LATE: Final = frozenset({AttemptState.LOST, AttemptState.FAILED})
"""States of an earlier attempt whose success, coming late, still ends a job that waits."""

RESUMABLE: Final = frozenset({AttemptState.STARTED, AttemptState.LOST})
"""States of its last attempt in which a job may be gone on with."""

# -- submission and its end by the user


def enqueue(t: Tables, new: NewJob, limits: QueueLimits, now: float) -> Reply:
    account, band = new.job.account, new.job.band
    if (twin := t.find_twin(new)) is not None:
        return twin_reply(t, new, twin)
    if t.waiting_total >= limits.queued_max:
        return Reply(code=Code.FULL, n=t.n)
    if t.waiting_of(account) >= limits.queued_per_account_max:
        return Reply(code=Code.ACCOUNT_FULL, n=t.n)
    f = t.lift(band, account)
    job = replace(new.job, arrival=t.n + 1, submitted_at=now)
    row = Row(
        job=job,
        v=t.n + 1,
        digest=new.digest,
        client_job_id=new.client_job_id,
        idempotency_key=new.idempotency_key,
        size=len(new.body or b""),
    )
    n = t.change(row)
    t.add(row)
    t.tell(JobSubmitted(n=n, job=job, account_f=f))
    return Reply(code=Code.OK, n=n, job=job.id, state=row.state)


def twin_reply(t: Tables, new: NewJob, twin: Row) -> Reply:
    if twin.job.account != new.job.account:  # of which it may learn nothing
        return Reply(code=Code.CONFLICT, n=t.n, job=new.job.id)
    code = Code.EXISTS if twin.digest == new.digest else Code.CONFLICT
    return Reply(code=code, n=t.n, job=twin.job.id, state=twin.state)


def cancel(t: Tables, job: JobId, failure: Failure | None, now: float) -> Reply:
    """1. unknown or ended  2. started: a promise  3. waiting or merely claimed: ends now."""
    row = t.find(job)
    if row is None:
        return Reply(code=Code.UNKNOWN, n=t.n, job=job)
    if row.state in ENDED:
        # Cancelled while it waited: this may be the same cancel, sent again.
        again = row.state is JobState.CANCELLED and row.ended_by is None
        return Reply(code=Code.CANCELLED if again else Code.ENDED, n=t.n, job=job, state=row.state)
    grant = row.grant
    if grant is not None and grant.state is AttemptState.STARTED:
        if not row.cancel_wanted:
            row.cancel_wanted, row.failure = True, failure
            n = t.change(row)
            t.tell(CancelWanted(n=n, job=job))
        return Reply(code=Code.CANCELLING, n=t.n, job=job, state=row.state)
    t.take(row)
    drop_claim(t, row)
    t.end(row, JobState.CANCELLED, failure, None, now)
    return Reply(code=Code.CANCELLED, n=t.n, job=job, state=row.state)


def prioritise(t: Tables, job: JobId, band: Band, priority: int) -> Reply:
    row = t.live.get(job)
    if row is None or row.grant is not None:
        code = Code.UNKNOWN if row is None and t.archive.find(job) is None else Code.NOT_WAITING
        return Reply(code=code, n=t.n, job=job)
    old = row.job
    if (old.band, old.priority) != (band, priority):
        t.take(row)
        f = t.f_of(band, old.account) if band == old.band else t.lift(band, old.account)
        row.job = replace(old, band=band, priority=priority)
        t.rest(row)
        n = t.change(row)
        t.tell(JobPrioritised(n=n, job=job, band=band, priority=priority, account_f=f))
    return Reply(code=Code.OK, n=t.n, job=job, state=row.state)


# -- one attempt


def claim(t: Tables, request: ClaimRequest, now: float) -> Reply:
    """1. stale  2. the same claim again  3. paused  4. draining  5. slot taken  6. first candidate to be
    had.
    """
    gpu, held = request.gpu, t.slots.get(request.gpu)
    node = t.nodes.get(request.node)
    if not is_current(node, request.boot) or node is None or gpu not in node.gpus:
        return Reply(code=Code.STALE, n=t.n)
    holder = held.grant if held is not None else None
    if held is not None and holder is not None and holder.claim == request.claim:
        return Reply(code=Code.OK, n=t.n, job=held.job.id, token=holder.token, state=held.state)
    if t.paused:
        return Reply(code=Code.HOLD, n=t.n)
    if gpu in t.draining:
        return Reply(code=Code.DRAINING, n=t.n)
    if held is not None and holder is not None:
        return Reply(code=Code.BUSY, n=t.n, job=held.job.id, token=holder.token, state=held.state)
    for candidate in request.candidates:
        row = t.live.get(candidate.job)
        if row is not None and may_claim(row, gpu, candidate, now):
            return grant_claim(t, row, request, candidate, now)
    return Reply(code=Code.LOST, n=t.n)


def is_current(node: Node | None, boot: int) -> bool:
    return node is not None and node.present and node.boot == boot


def may_claim(row: Row, gpu: GpuId, candidate: ClaimCandidate, now: float) -> bool:
    return (
        row.grant is None
        and (row.not_before_at is None or row.not_before_at <= now)
        and (candidate.despite_avoid or gpu not in row.avoid)
    )


def grant_claim(t: Tables, row: Row, request: ClaimRequest, candidate: ClaimCandidate, now: float) -> Reply:
    job = row.job
    v = t.v.get(job.band, 0.0)
    lowest = max((f for band, f in request.lowest_f if band == job.band), default=v)
    if lowest > v:
        t.v[job.band] = v = lowest
        t.changes.bands.add(job.band)
    t.take(row)
    n = t.change(row)
    token = Token(f"{n}.{request.claim}")
    grant = Attempt(
        number=row.attempts_counted + 1,
        token=token,
        claim=request.claim,
        gpu=request.gpu,
        node=request.node,
        boot=request.boot,
        engine=candidate.engine,
        state=AttemptState.CLAIMED,
        claimed_at=now,
        lease_until=now + request.lease_seconds,
        charged=0.0,
    )
    row.attempts = (*row.attempts[1 - ATTEMPTS_KEPT :], grant)
    t.activate(row, grant)
    f = t.pay(row, grant, candidate.charge_seconds / job.weight)
    t.tell(
        JobClaimed(
            n=n,
            job=job.id,
            gpu=request.gpu,
            node=request.node,
            token=token,
            claim=request.claim,
            account_f=f,
            band_v=v,
        )
    )
    return Reply(code=Code.OK, n=n, job=job.id, token=token, state=row.state)


def start(t: Tables, job: JobId, token: Token, now: float) -> Reply:
    row, grant = held_by(t, job, token)
    if row is None or grant is None:
        return refusal(t, job, row)
    if grant.state is AttemptState.STARTED:
        return Reply(code=Code.OK, n=t.n, job=job, token=token, state=row.state)
    if grant.lease_until <= now:
        return Reply(code=Code.EXPIRED, n=t.n, job=job, token=token, state=row.state)
    grant.state, grant.started_at = AttemptState.STARTED, now
    row.attempts_counted += 1
    row.state, row.not_before_at = JobState.RUNNING, None
    n = t.change(row)
    t.tell(JobStarted(n=n, job=job, token=token, attempts=row.attempts_counted))
    return Reply(code=Code.OK, n=n, job=job, token=token, state=row.state)


def release(t: Tables, job: JobId, token: Token, why: str) -> Reply:
    row, grant = held_by(t, job, token)
    if row is not None and row.given_back == token:
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state)
    if row is None or grant is None or grant.state is not AttemptState.CLAIMED:
        return refusal(t, job, row)
    t.take(row)
    f = drop_claim(t, row)
    t.rest(row)
    row.given_back = token
    n = t.change(row)
    t.tell(JobReleased(n=n, job=job, token=token, account_f=f, why=why))
    return Reply(code=Code.OK, n=n, job=job, state=row.state)


def drop_claim(t: Tables, row: Row) -> float:
    """Forget the claim of a taken job that was not started, if there is one, and refund it; returns F."""
    grant = row.grant
    if grant is None:
        return t.f_of(row.job.band, row.job.account)
    assert grant.state is AttemptState.CLAIMED
    row.attempts = row.attempts[:-1]
    return t.pay(row, grant, 0.0)


def finish(
    t: Tables,
    job: JobId,
    token: Token,
    state: JobState,
    failure: Failure | None,
    used: Seconds,
    result: bytes | None,
    now: float,
) -> tuple[Reply, bool]:
    """Return also whether the result is to be kept: a job that ends otherwise than its engine said has
    none.
    """
    row = t.find(job)
    if row is not None and row.ended_by == token:  # the same finish again
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state), False
    attempt = None if row is None else may_finish(row, token, state)
    if row is None or attempt is None:
        return refusal(t, job, row), False
    end_state, end_failure = outcome(row, state, failure)
    is_kept = end_state is state
    is_holder = row.grant is attempt
    t.take(row)
    if not is_holder:
        drop_claim(t, row)
    ended_well = state is JobState.SUCCEEDED
    close_attempt(attempt, AttemptState.FINISHED if ended_well else AttemptState.FAILED, failure, now)
    t.pay(row, attempt, used / row.job.weight)
    row.size += len(result or b"") if is_kept else 0
    t.end(row, end_state, end_failure, token, now)
    return Reply(code=Code.OK, n=t.n, job=job, state=end_state), is_kept


def may_finish(row: Row, token: Token, state: JobState) -> Attempt | None:
    """1. the holder, once it has started  2. late: a success, nothing started since  3. nobody else."""
    attempt, holder = row.attempt(token), row.grant
    if attempt is None or row.state in ENDED:
        return None
    if attempt is holder:
        return attempt if attempt.state is AttemptState.STARTED else None
    is_late = attempt.state in LATE and state is JobState.SUCCEEDED
    return attempt if is_late and (holder is None or holder.state is AttemptState.CLAIMED) else None


def outcome(row: Row, state: JobState, failure: Failure | None) -> tuple[JobState, Failure | None]:
    """A wanted cancel rules over every outcome; without one there is no `cancelled`."""
    if row.cancel_wanted:
        return JobState.CANCELLED, row.failure
    if state is JobState.CANCELLED:
        return JobState.FAILED, failure
    return state, failure


def close_attempt(attempt: Attempt, state: AttemptState, failure: Failure | None, now: float) -> None:
    attempt.state, attempt.failure, attempt.ended_at, attempt.suspect_at = state, failure, now, None


def fail(
    t: Tables, job: JobId, token: Token, failure: Failure, again: Again, used: Seconds, now: float
) -> Reply:
    row, grant = held_by(t, job, token)
    if row is not None and grant is None and was_failed(row, token):
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state)
    if row is None or grant is None or grant.state is not AttemptState.STARTED:
        return refusal(t, job, row)
    t.take(row)
    close_attempt(grant, AttemptState.FAILED, failure, now)
    f = t.pay(row, grant, 0.0 if again.refund else used / row.job.weight)
    if row.cancel_wanted:
        t.end(row, JobState.CANCELLED, row.failure, token, now)
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state)
    t.rest(row)
    row.state, row.avoid, row.failure = JobState.WAITING_RETRY, again.avoid, failure
    row.not_before_at = now + again.rest_seconds if again.rest_seconds > 0 else None
    n = t.change(row)
    t.tell(
        AttemptFailed(
            n=n,
            job=job,
            token=token,
            failure=failure,
            avoid=again.avoid,
            not_before_seconds=max(0.0, again.rest_seconds),
            account_f=f,
        )
    )
    return Reply(code=Code.OK, n=n, job=job, state=row.state)


def was_failed(row: Row, token: Token) -> bool:
    """Whether this attempt has been told to be over, so that `fail` changes nothing more: most likely it
    came again.
    """
    if row.state in ENDED:
        return row.state is JobState.CANCELLED and row.ended_by == token  # as was wanted meanwhile
    attempt = row.attempt(token)
    return attempt is not None and attempt.state is AttemptState.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What a holder says that wants to go on with its attempt."""

    node: NodeId
    boot: int
    gpu: GpuId
    job: JobId
    token: Token
    claim: ClaimId
    lease_seconds: Seconds


def resume(t: Tables, asked: Resume, now: float) -> Reply:
    """1. stale boot  2. unknown  3. the same resume again  4. superseded, ended  5. rescued, and the slot
    taken.
    """
    job, gpu = asked.job, asked.gpu
    if not is_current(t.nodes.get(asked.node), asked.boot):
        return Reply(code=Code.STALE, n=t.n, job=job)
    row = t.find(job)
    if row is None:
        return Reply(code=Code.UNKNOWN, n=t.n, job=job)
    grant = row.grant
    if grant is not None and grant.claim == asked.claim and grant.gpu == gpu:
        return Reply(code=Code.OK, n=t.n, job=job, token=grant.token, state=row.state)
    last = row.attempts[-1] if row.attempts else None
    is_theirs = last is not None and (last.token, last.node, last.gpu) == (asked.token, asked.node, gpu)
    if last is None or not is_theirs or row.state in ENDED or last.state not in RESUMABLE:
        return Reply(code=Code.GONE, n=t.n, job=job, state=row.state)
    if last.state is AttemptState.LOST and gpu in t.slots:
        return Reply(code=Code.BUSY, n=t.n, job=job, state=row.state)
    return go_on(t, row, last, asked, now)


def go_on(t: Tables, row: Row, attempt: Attempt, asked: Resume, now: float) -> Reply:
    """Give the attempt a new token. What a rescue refunded stays so: the end charges what was used."""
    t.take(row)
    n = t.change(row)
    attempt.token, attempt.claim, attempt.boot = Token(f"{n}.{asked.claim}"), asked.claim, asked.boot
    attempt.state, attempt.lease_until = AttemptState.STARTED, now + asked.lease_seconds
    attempt.suspect_at = attempt.ended_at = attempt.failure = None
    row.state, row.not_before_at = JobState.RUNNING, None
    if not row.cancel_wanted:
        row.failure = None
    t.activate(row, attempt)
    t.tell(AttemptResumed(n=n, job=row.job.id, gpu=attempt.gpu, node=attempt.node, token=attempt.token))
    return Reply(code=Code.OK, n=n, job=row.job.id, token=attempt.token, state=row.state)


# -- what several verbs ask


def held_by(t: Tables, job: JobId, token: Token) -> tuple[Row | None, Attempt | None]:
    """Return the job, and its attempt if this is the token that holds it."""
    row = t.find(job)
    grant = row.grant if row is not None else None
    return row, grant if grant is not None and grant.token == token else None


def refusal(t: Tables, job: JobId, row: Row | None) -> Reply:
    if row is None:
        return Reply(code=Code.UNKNOWN, n=t.n, job=job)
    return Reply(code=Code.STALE, n=t.n, job=job, state=row.state)
