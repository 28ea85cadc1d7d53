"""The live jobs in memory with everything a verb looks at, and what the current batch of verbs changed.

No I/O and no clock: `now` is passed in. Ended jobs leave these tables for the archive at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpulane.core.events import ActiveJob, JobEnded, Snapshot, StoreEvent, WaitingJob
from gpulane.core.model import (
    Account,
    AttemptState,
    Band,
    Failure,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Service,
    Token,
)
from gpulane.store.base import NewJob
from gpulane.store.records import Archive, Attempt, Node, Row


@dataclass(slots=True)
class Changes:
    """What verbs changed since the last commit: the events to tell, the rows to write."""

    events: list[StoreEvent] = field(default_factory=list[StoreEvent])
    rows: dict[JobId, Row] = field(default_factory=dict[JobId, Row])
    accounts: set[tuple[Band, Account]] = field(default_factory=set[tuple[Band, Account]])
    bands: set[Band] = field(default_factory=set[Band])
    nodes: set[NodeId] = field(default_factory=set[NodeId])
    gpus: set[GpuId] = field(default_factory=set[GpuId])
    paused: bool = False
    """Whether the pause changed."""


class Tables:
    """Live jobs by id, client's id, key, gpu; counts of what waits; F and V; nodes, drained gpus, the
    pause; n.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.n = 0
        self.live: dict[JobId, Row] = {}
        """In order of arrival."""
        self.active: dict[JobId, Row] = {}
        """Claimed or started."""
        self.slots: dict[GpuId, Row] = {}
        self.by_client: dict[tuple[Account, Service, str], Row] = {}
        self.by_key: dict[tuple[Account, str], Row] = {}
        self.waiting: dict[tuple[Band, Account], int] = {}
        """How many wait, claimed ones not among them; no zeros."""
        self.waiting_total = 0
        self.f: dict[tuple[Band, Account], float] = {}
        self.v: dict[Band, float] = {}
        self.draining: set[GpuId] = set()
        self.paused = False
        self.nodes: dict[NodeId, Node] = {}
        self.swept_at: float | None = None
        self.changes = Changes()

    # -- finding

    def find(self, job: JobId) -> Row | None:
        """Return the job, live or ended."""
        return self.live.get(job) or self.archive.find(job)

    def find_client(self, account: Account, service: Service, client_job_id: str) -> Row | None:
        row = self.by_client.get((account, service, client_job_id))
        return row or self.archive.find_client(account, service, client_job_id)

    def find_twin(self, new: NewJob) -> Row | None:
        """Return the job that already has one of the new one's names."""
        job = new.job
        twin = self.find(job.id)
        if twin is None and new.client_job_id is not None:
            twin = self.find_client(job.account, job.service, new.client_job_id)
        if twin is None and new.idempotency_key is not None:
            key = new.idempotency_key
            twin = self.by_key.get((job.account, key)) or self.archive.find_key(job.account, key)
        return twin

    def waiting_of(self, account: Account) -> int:
        return sum(self.waiting.get((band, account), 0) for band in Band)

    # -- moving; each keeps all indexes together

    def add(self, row: Row) -> None:
        """Take a live job in, as it is: waiting or under a claim."""
        job = row.job
        self.live[job.id] = row
        if row.client_job_id is not None:
            self.by_client[job.account, job.service, row.client_job_id] = row
        if row.idempotency_key is not None:
            self.by_key[job.account, row.idempotency_key] = row
        if (grant := row.grant) is not None:
            self.activate(row, grant)
        else:
            self.rest(row)

    def take(self, row: Row) -> None:
        """Take a live job from where it is, waiting or under a claim; `activate`, `rest` or `end` must
        follow.
        """
        if (grant := row.grant) is not None:
            del self.active[row.job.id]
            del self.slots[grant.gpu]
        else:
            self.count_waiting(row, -1)

    def activate(self, row: Row, grant: Attempt) -> None:
        """Put a taken job under a claim."""
        self.active[row.job.id] = row
        self.slots[grant.gpu] = row

    def rest(self, row: Row) -> None:
        """Put a taken job to those that wait."""
        self.count_waiting(row, 1)

    def end(self, row: Row, state: JobState, failure: Failure | None, by: Token | None, now: float) -> None:
        """Record a taken job's end, once, and tell it."""
        job = row.job
        del self.live[job.id]
        if row.client_job_id is not None:
            del self.by_client[job.account, job.service, row.client_job_id]
        if row.idempotency_key is not None:
            del self.by_key[job.account, row.idempotency_key]
        row.state, row.failure, row.ended_by, row.finished_at = state, failure, by, now
        row.not_before_at = None
        n = self.change(row)
        f = self.f_of(job.band, job.account)
        self.tell(JobEnded(n=n, job=job.id, state=state, account_f=f, failure=failure))
        self.archive.keep(row)

    def count_waiting(self, row: Row, by: int) -> None:
        key = (row.job.band, row.job.account)
        count = self.waiting.get(key, 0) + by
        assert count >= 0
        if count:
            self.waiting[key] = count
        else:
            del self.waiting[key]
        self.waiting_total += by

    # -- fair share (docs/scheduling M1-M3)

    def f_of(self, band: Band, account: Account) -> float:
        return self.f.get((band, account), 0.0)

    def set_f(self, band: Band, account: Account, f: float) -> float:
        if self.f.get((band, account)) != f:
            self.f[band, account] = f
            self.changes.accounts.add((band, account))
        return f

    def lift(self, band: Band, account: Account) -> float:
        """M1: an account with nothing waiting in the band starts at V."""
        f = self.f_of(band, account)
        if (band, account) not in self.waiting:
            f = max(f, self.v.get(band, 0.0))
        return self.set_f(band, account, f)

    def pay(self, row: Row, attempt: Attempt, share: float) -> float:
        """Let F hold `share` (GPU-seconds / weight) for this attempt instead of what it holds; returns F.
        M2, M3.
        """
        job = row.job
        f = self.f_of(job.band, job.account) + (share - attempt.charged)
        attempt.charged = share
        return self.set_f(job.band, job.account, f)

    def prune_accounts(self) -> None:
        """Forget accounts at or below V that have no live job: their next job lifts them to V in any case."""
        busy = {(row.job.band, row.job.account) for row in self.active.values()} | self.waiting.keys()
        for key in [key for key, f in self.f.items() if f <= self.v.get(key[0], 0.0) and key not in busy]:
            del self.f[key]
            self.changes.accounts.add(key)

    # -- telling

    def change(self, row: Row | None = None) -> int:
        """Count an accepted change, of this job if one is named; returns its event number."""
        self.n += 1
        if row is not None:
            row.v = self.n
            self.changes.rows[row.job.id] = row
        return self.n

    def tell(self, event: StoreEvent) -> None:
        assert event.n == self.n
        self.changes.events.append(event)

    def take_changes(self) -> Changes:
        """Hand out what changed, and begin anew."""
        changes, self.changes = self.changes, Changes()
        return changes

    def snapshot(self, now: float) -> Snapshot:
        """Tell everything a book needs. Orders are defined, so that equal tables give equal snapshots."""
        return Snapshot(
            n=self.n,
            waiting=tuple(
                waiting_job(row, now) for row in self.live.values() if row.job.id not in self.active
            ),
            active=tuple(
                active_job(row, grant)
                for row in sorted(self.active.values(), key=lambda row: row.job.arrival)
                if (grant := row.grant) is not None
            ),
            account_f=tuple(sorted((band, account, f) for (band, account), f in self.f.items())),
            band_v=tuple(sorted(self.v.items())),
            draining=frozenset(self.draining),
            paused=self.paused,
        )


def waiting_job(row: Row, now: float) -> WaitingJob:
    rest = 0.0 if row.not_before_at is None else max(0.0, row.not_before_at - now)
    return WaitingJob(job=row.job, attempts=row.attempts_counted, avoid=row.avoid, not_before_seconds=rest)


def active_job(row: Row, grant: Attempt) -> ActiveJob:
    return ActiveJob(
        job=row.job,
        gpu=grant.gpu,
        node=grant.node,
        token=grant.token,
        started=grant.state is AttemptState.STARTED,
        cancel_wanted=row.cancel_wanted,
        attempts=row.attempts_counted,
        avoid=row.avoid,
    )
