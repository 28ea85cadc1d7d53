"""A book of a few lines that knows nothing but events: it must hold what the store's snapshot says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar, assert_never

from gpulane.core.events import (
    ActiveJob,
    AttemptFailed,
    AttemptResumed,
    CancelWanted,
    GpuDrained,
    JobClaimed,
    JobEnded,
    JobPrioritised,
    JobReleased,
    JobStarted,
    JobSubmitted,
    LeaseExpired,
    NodeChanged,
    QueuePaused,
    Snapshot,
    StoreEvent,
    WaitingJob,
)
from gpulane.core.model import Account, Band, GpuId, JobId

K = TypeVar("K")


@dataclass
class ToyBook:
    """Waiting and active jobs, F, V, drained gpus, the pause."""

    n: int = 0
    waiting: dict[JobId, WaitingJob] = field(default_factory=dict[JobId, WaitingJob])
    active: dict[JobId, ActiveJob] = field(default_factory=dict[JobId, ActiveJob])
    f: dict[tuple[Band, Account], float] = field(default_factory=dict[tuple[Band, Account], float])
    v: dict[Band, float] = field(default_factory=dict[Band, float])
    draining: set[GpuId] = field(default_factory=set[GpuId])
    paused: bool = False

    def apply(self, event: StoreEvent) -> None:
        assert event.n == self.n + 1, "event numbers are dense"
        self.n = event.n
        match event:
            case JobSubmitted():
                self.waiting[event.job.id] = WaitingJob(job=event.job)
                self.f[event.job.band, event.job.account] = event.account_f
            case JobClaimed():
                was = self.waiting.pop(event.job)
                self.active[event.job] = ActiveJob(
                    job=was.job,
                    gpu=event.gpu,
                    node=event.node,
                    token=event.token,
                    started=False,
                    cancel_wanted=False,
                    attempts=was.attempts,
                    avoid=was.avoid,
                )
                self.f[was.job.band, was.job.account] = event.account_f
                self.v[was.job.band] = event.band_v
            case JobStarted():
                self.change(event.job, started=True, attempts=event.attempts)
            case JobReleased() | AttemptFailed():
                was_active = self.active.pop(event.job)
                avoid = event.avoid if isinstance(event, AttemptFailed) else was_active.avoid
                self.waiting[event.job] = WaitingJob(
                    job=was_active.job, attempts=was_active.attempts, avoid=avoid
                )
                self.f[was_active.job.band, was_active.job.account] = event.account_f
            case JobEnded():
                ended = self.waiting.pop(event.job, None) or self.active.pop(event.job)
                self.f[ended.job.band, ended.job.account] = event.account_f
            case JobPrioritised():
                self.prioritise(event)
            case AttemptResumed():
                self.resume(event)
            case CancelWanted():
                self.change(event.job, cancel_wanted=True)
            case GpuDrained():
                (self.draining.add if event.draining else self.draining.discard)(event.gpu)
            case QueuePaused():
                self.paused = event.paused
            case LeaseExpired() | NodeChanged():
                pass
            case _:
                assert_never(event)

    def change(self, job: JobId, **what: object) -> None:
        self.active[job] = replace(self.active[job], **what)

    def prioritise(self, event: JobPrioritised) -> None:
        was = self.waiting[event.job]
        job = replace(was.job, band=event.band, priority=event.priority)
        self.waiting[event.job] = replace(was, job=job)
        self.f[event.band, job.account] = event.account_f

    def resume(self, event: AttemptResumed) -> None:
        waited = self.waiting.pop(event.job, None)
        if waited is None:
            self.change(event.job, token=event.token, gpu=event.gpu, node=event.node)
            return
        self.active[event.job] = ActiveJob(
            job=waited.job,
            gpu=event.gpu,
            node=event.node,
            token=event.token,
            started=True,
            cancel_wanted=False,
            attempts=waited.attempts,
            avoid=waited.avoid,
        )

    def agrees_with(self, snapshot: Snapshot) -> None:
        """Assert it; how long jobs still rest is left out, since that passes by itself."""
        waiting = {w.job.id: replace(w, not_before_seconds=0.0) for w in snapshot.waiting}
        assert waiting == self.waiting
        assert {a.job.id: a for a in snapshot.active} == self.active
        assert nonzero({(band, account): f for band, account, f in snapshot.account_f}) == nonzero(self.f)
        assert nonzero(dict(snapshot.band_v)) == nonzero(self.v)
        assert (snapshot.n, snapshot.draining, snapshot.paused) == (self.n, self.draining, self.paused)
        arrivals = [w.job.arrival for w in snapshot.waiting]
        assert arrivals == sorted(arrivals)


def nonzero(table: dict[K, float]) -> dict[K, float]:
    return {key: value for key, value in table.items() if value}
