"""Makes a new job of what an adapter recognized and who asks. No I/O: the gateway admits and stores it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpulane.adapters.base import Recognized
from gpulane.core.model import Band, EngineUrl, Job, JobId, Service
from gpulane.store.base import NewJob
from gpulane.web.ports import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a client may ask for besides the work itself."""

    band: Band = Band.NORMAL
    priority: int = 0
    labels: frozenset[str] = field(default_factory=frozenset[str])
    max_attempts: int | None = None
    idempotency_key: str | None = None
    engine: EngineUrl | None = None
    held: bool = False


def new_job(
    job_id: JobId,
    service: Service,
    recognized: Recognized,
    identity: Identity,
    *,
    attempts_max: int,
    wishes: Wishes,
) -> NewJob:
    """Put a job together."""
    job = Job(
        id=job_id,
        account=identity.account,
        service=service,
        kind=recognized.kind,
        model=recognized.model,
        signature=recognized.signature,
        work=recognized.work,
        needs=recognized.needs,
        labels=wishes.labels,
        engine=wishes.engine,
        band=wishes.band,
        priority=wishes.priority,
        weight=identity.weight,
        held=wishes.held,
        max_attempts=wishes.max_attempts or attempts_max,
    )
    return NewJob(
        job=job,
        meta=recognized.meta,
        digest=recognized.digest,
        client_job_id=recognized.client_job_id,
        idempotency_key=wishes.idempotency_key,
    )
