"""What a store holds of one job while it runs: mutable rows, and the frozen records that are shown of them.

A row is changed by `transitions` and `sweeping` alone, inside one verb; nothing outside the store ever
holds one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from gpulane.core.model import (
    ENDED,
    Account,
    AttemptState,
    ClaimId,
    EngineUrl,
    Failure,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Service,
    Token,
)
from gpulane.errors import BadRequest
from gpulane.store.base import AttemptRecord, JobQuery, JobRecord, NewJob

ATTEMPTS_KEPT: Final = 16
"""How many attempts a record remembers; the oldest are forgotten first, their count is not."""
NO_GPUS: Final[frozenset[GpuId]] = frozenset()
LIVE_ATTEMPT: Final = frozenset({AttemptState.CLAIMED, AttemptState.STARTED})


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt, from its claim on. A claim that is given back leaves no attempt."""

    number: int
    token: Token
    claim: ClaimId
    gpu: GpuId
    node: NodeId
    boot: int
    engine: EngineUrl
    state: AttemptState
    claimed_at: float
    lease_until: float
    """Store seconds. Past it the lease is over, and is never renewed."""
    charged: float
    """What the account's F holds for this attempt now: GPU-seconds / weight."""
    started_at: float | None = None
    ended_at: float | None = None
    suspect_at: float | None = None
    """When the end of its lease was marked; the grace runs from here."""
    failure: Failure | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """One job. Small while it waits: what only people ask for (meta, body, result) lies elsewhere."""

    job: Job
    state: JobState = JobState.QUEUED
    v: int
    digest: str = ""
    client_job_id: str | None = None
    idempotency_key: str | None = None
    attempts: tuple[Attempt, ...] = ()
    attempts_counted: int = 0
    avoid: frozenset[GpuId] = NO_GPUS
    failure: Failure | None = None
    cancel_wanted: bool = False
    ended_by: Token | None = None
    given_back: Token | None = None
    """Token of the claim last given back: a repeated release or expire is answered by it."""
    finished_at: float | None = None
    not_before_at: float | None = None
    size: int = 0
    """Bytes of body and result."""

    @property
    def grant(self) -> Attempt | None:
        """The attempt that holds the job now, claimed or started."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.state in LIVE_ATTEMPT else None

    def attempt(self, token: Token) -> Attempt | None:
        """Return the attempt that has this token, whatever became of it."""
        return next((a for a in reversed(self.attempts) if a.token == token), None)


class Archive(Protocol):
    """Where ended jobs are. The tables keep the live ones only."""

    def find(self, job: JobId) -> Row | None: ...

    def find_client(self, account: Account, service: Service, client_job_id: str) -> Row | None: ...

    def find_key(self, account: Account, idempotency_key: str) -> Row | None: ...

    def keep(self, row: Row) -> None:
        """Take a job over that ended just now."""
        ...


@dataclass(slots=True, kw_only=True)
class Node:
    """A machine, as it registered."""

    id: NodeId
    boot: int
    name: str
    gpus: dict[GpuId, str]
    """To their UUIDs."""
    present: bool = True
    seen_until: float = field(default=0.0, compare=False)
    """Never durable: a store that was away knows of nobody that he lives."""


def check_storable(new: NewJob) -> None:
    """Refuse text that is none: headers may carry bytes that no UTF-8 stands for, and no disk would take
    them.
    """
    try:
        msgspec.json.encode((new.job, new.digest, new.client_job_id, new.idempotency_key))
    except UnicodeEncodeError:
        raise BadRequest("the job's ids and names must be UTF-8 text") from None


def record_of(row: Row, meta: bytes) -> JobRecord:
    """Return what is shown of a job."""
    grant = row.grant
    last = row.attempts[-1] if row.attempts else None
    shown = grant or (last if row.state in ENDED else None)
    return JobRecord(
        job=row.job,
        state=row.state,
        v=row.v,
        meta=meta,
        client_job_id=row.client_job_id,
        token=grant.token if grant else None,
        gpu=shown.gpu if shown else None,
        node=shown.node if shown else None,
        engine=shown.engine if shown else None,
        started=grant is not None and grant.state is AttemptState.STARTED,
        cancel_wanted=row.cancel_wanted,
        attempts=tuple(attempt_record_of(a) for a in row.attempts),
        attempts_counted=row.attempts_counted,
        avoid=row.avoid,
        failure=row.failure,
        ended_by=row.ended_by,
        submitted_at=row.job.submitted_at,
        started_at=next((a.started_at for a in reversed(row.attempts) if a.started_at is not None), None),
        finished_at=row.finished_at,
        not_before_at=row.not_before_at,
    )


def attempt_record_of(attempt: Attempt) -> AttemptRecord:
    return AttemptRecord(
        number=attempt.number,
        gpu=attempt.gpu,
        node=attempt.node,
        engine=attempt.engine,
        state=attempt.state,
        claimed_at=attempt.claimed_at,
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
        failure=attempt.failure,
    )


def matches(row: Row, query: JobQuery) -> bool:
    job = row.job
    return (
        (query.account is None or job.account == query.account)
        and (not query.states or row.state in query.states)
        and (query.service is None or job.service == query.service)
        and (query.before is None or job.arrival < query.before)
    )
