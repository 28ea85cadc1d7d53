"""The attempts under way, as the book keeps them. Data alone; `transitions` says which moves are legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gpulane.core.events import ActiveJob, AttemptResumed, JobClaimed
from gpulane.core.model import AttemptState, GpuId, Job, JobState, NodeId, Token
from gpulane.core.queues import WaitingEntry


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveEntry:
    """One job under a claim, started or not."""

    job: Job
    gpu: GpuId
    node: NodeId
    token: Token
    state: AttemptState
    attempts: int
    """Attempts started so far, this one included once it was started."""
    avoid: frozenset[GpuId]
    cancel_wanted: bool = False
    suspect: bool = False
    """Its lease ran out, and nobody has rescued it yet."""

    @property
    def job_state(self) -> JobState:
        if self.state is AttemptState.STARTED:
            return JobState.RUNNING
        return JobState.WAITING_RETRY if self.attempts else JobState.QUEUED

    @classmethod
    def of_snapshot(cls, active: ActiveJob) -> Self:
        return cls(
            job=active.job,
            gpu=active.gpu,
            node=active.node,
            token=active.token,
            state=AttemptState.STARTED if active.started else AttemptState.CLAIMED,
            attempts=active.attempts,
            avoid=active.avoid,
            cancel_wanted=active.cancel_wanted,
        )

    @classmethod
    def of_event(cls, entry: WaitingEntry, event: JobClaimed | AttemptResumed) -> Self:
        resumed = isinstance(event, AttemptResumed)
        return cls(
            job=entry.job,
            gpu=event.gpu,
            node=event.node,
            token=event.token,
            state=AttemptState.STARTED if resumed else AttemptState.CLAIMED,
            attempts=max(entry.attempts, 1) if resumed else entry.attempts,
            avoid=entry.avoid,
        )
