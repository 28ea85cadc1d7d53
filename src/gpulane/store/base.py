"""The store contract: what every store promises, whichever engine is under it. Pure: types and prose, no I/O.

Two authorities, never mixed. The *gpu* belongs to one process on its node (its lock file, its durable gpu
record). The *job's record* belongs to the store: its state, who may write it, how it ended. An engine
cannot check a token, so no lease in a store protects a gpu; the lease only says who may write the record
and when somebody else may try the job.

Rules that hold for every verb
  1. A verb is one transition: compare, change, append one event, reply. It is atomic, and true once its
     reply is out; for what was acknowledged, true also after kill -9 and power loss (stores that persist at
     all).
  2. A verb may be sent twice with the same arguments and answers the same the second time, changing nothing.
  3. Every reply carries `n`, the store's event number after it. Event numbers are dense: +1 per accepted
     change.
  4. The credential of an attempt is its token, `<n of the grant>.<claim id>`, compared as a whole string. A
     write with another token is STALE and changes nothing.
  5. Events reach listeners in the order of `n`, on the event loop, before the reply of the verb that made
     them.
  6. Only the store's clock is compared with the store's clock. Leases run in it; callers pass durations,
     never times.
  7. Ended is ended: no verb moves a job out of succeeded, failed or cancelled, save `prune`, which forgets
     it.

Life of a record
     enqueue         claim             start             finish | fail(end)
  ->  queued  ---------------> (claimed) -----> running -------------------> succeeded | failed | cancelled
        ^ ^-- release, expire --'               |  '-- fail(again), rescue --> waiting_retry -- claim --> ...
        '-------------- cancel of queued, waiting_retry or claimed: cancelled at once

A claimed job still shows as `queued` (or `waiting_retry`): nothing was computed, and it may be cancelled or
released at no cost. `start` is a second compare-and-set: only after its OK may a byte go to an engine, and
only it counts an attempt.

A cancel of a started job is a promise: it sets `cancel_wanted`, and from there on the job can only end
`cancelled`, whatever the engine answers. "Interrupted" without a wanted cancel is a failed attempt, never a
cancel.

A lease that expired is never renewed. Its holder may `resume` (same attempt, new token) until the attempt
is rescued. Rescue is two steps: `expire` marks a suspect, `rescue` takes it once the grace has passed since
the mark.

Fair share (docs/scheduling M1-M3) is kept here because it must survive restarts and be the same for all: F
per (band, account), V per band. enqueue lifts F to V when the account has nothing waiting in the band;
claim sets V = max(V, lowest F of the caller's book) and adds charge / weight to F; release and a fault of
ours refund it; finish and fail correct it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from gpulane.core.events import Snapshot, StoreEvent
from gpulane.core.model import (
    Account,
    AttemptState,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Service,
    Token,
)

PAGE_MAX: Final = 500
"""The longest page that `jobs` returns, whatever is asked."""
PRUNE_MAX: Final = 500
"""How many jobs one `prune` forgets."""

Listener = Callable[[tuple[StoreEvent, ...]], None]


class Code(StrEnum):
    """The first word of every reply."""

    OK = "ok"
    EXISTS = "exists"
    """enqueue: this account has that job already, with the same content. Success for the caller."""
    CONFLICT = "conflict"
    """enqueue: the id (or client's id, or idempotency key) is taken by other content."""
    FULL = "full"
    ACCOUNT_FULL = "account_full"
    LOST = "lost"
    """claim: none of the candidates waits any more."""
    BUSY = "busy"
    """claim: the gpu's slot is taken; `job` and `token` say by what."""
    DRAINING = "draining"
    HOLD = "hold"
    """claim: the queue is paused (Redis: or the store holds after a restart)."""
    STALE = "stale"
    """The token (or boot) is not the current one."""
    EXPIRED = "expired"
    """The lease is over: not renewed, not started; try resume."""
    GONE = "gone"
    """beat, resume: the attempt was superseded or the job ended."""
    UNKNOWN = "unknown"
    """No such record."""
    CANCEL = "cancel"
    """beat: renewed, and a cancel is wanted."""
    CANCELLED = "cancelled"
    """cancel: ended now."""
    CANCELLING = "cancelling"
    """cancel: runs; will end cancelled."""
    ENDED = "ended"
    """The job has already ended; `state` says how."""
    NOT_WAITING = "not_waiting"
    """prioritise: it no longer waits."""
    NOT_DUE = "not_due"
    """expire, rescue: lease not over, grace not over."""
    TAKEN = "taken"
    """register: another live node has this gpu."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a verb answers."""

    code: Code
    n: int
    job: JobId | None = None
    token: Token | None = None
    state: JobState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait (claimed and running jobs not counted); enqueue refuses beyond."""

    queued_max: int = 100_000
    queued_per_account_max: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What enqueue takes. `job.arrival` and `job.submitted_at` are the store's to set."""

    job: Job
    meta: bytes = b"{}"
    """Immutable JSON, opaque to the store: what adapters and front doors need again (client ids, endpoint,
    labels, webhook).
    """
    body: bytes | None = None
    """What is sent to the engine, durable with the job; None for held jobs, whose body dies with the
    connection.
    """
    digest: str = ""
    """Digest of the content: tells EXISTS from CONFLICT."""
    client_job_id: str | None = None
    """The client's own id, unique per (account, service)."""
    idempotency_key: str | None = None
    """Unique per account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimCandidate:
    """One job a claim may take."""

    job: JobId
    engine: EngineUrl
    charge_seconds: Seconds
    """GPU-seconds; the store divides by the account's weight."""
    despite_avoid: bool = False
    """Take it although it avoids this gpu: no other is eligible. The store cannot know that; who decides
    does.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRequest:
    """One gpu asks for the first of these jobs that still waits, has rested and does not avoid it."""

    node: NodeId
    boot: int
    gpu: GpuId
    claim: ClaimId
    lease_seconds: Seconds
    candidates: tuple[ClaimCandidate, ...]
    lowest_f: tuple[tuple[Band, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """fail: make another attempt."""

    rest_seconds: Seconds
    avoid: frozenset[GpuId]
    refund: bool
    """The account does not pay for it: the fault was ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatReply:
    """What one heartbeat learned."""

    code: Code
    n: int
    store_seconds: float
    """The store's clock, seconds since 1970."""
    leases: tuple[tuple[JobId, Code], ...] = ()
    """Per pair sent: OK, CANCEL, EXPIRED, GONE or UNKNOWN."""
    slots: tuple[tuple[GpuId, JobId, Token], ...] = ()
    """What the store thinks this node's gpus hold."""
    expired: tuple[tuple[JobId, Token], ...] = ()
    """Due for `expire` (at most 50; given to one beat per sweep interval)."""
    suspects: tuple[tuple[JobId, Token], ...] = ()
    """Suspects whose grace may be over: due for `rescue`."""
    nodes_gone: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterReply:
    """What a (re)starting node must clean up."""

    code: Code
    n: int
    held_waiting: tuple[JobId, ...] = ()
    """Held jobs of an earlier boot: to be cancelled, `client_gone`."""
    claims: tuple[tuple[JobId, Token], ...] = ()
    """Unstarted claims of an earlier boot: to be released."""
    started: tuple[tuple[JobId, Token, GpuId], ...] = ()
    """Started attempts of an earlier boot: to be looked for in their engines, then resumed, finished or
    failed.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt, as people see it later."""

    number: int
    gpu: GpuId
    node: NodeId
    engine: EngineUrl
    state: AttemptState
    claimed_at: float
    started_at: float | None = None
    ended_at: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job's whole record, as of event `v`."""

    job: Job
    state: JobState
    v: int
    meta: bytes
    client_job_id: str | None = None
    token: Token | None = None
    gpu: GpuId | None = None
    node: NodeId | None = None
    engine: EngineUrl | None = None
    started: bool = False
    cancel_wanted: bool = False
    attempts: tuple[AttemptRecord, ...] = ()
    attempts_counted: int = 0
    avoid: frozenset[GpuId] = field(default_factory=frozenset[GpuId])
    failure: Failure | None = None
    ended_by: Token | None = None
    submitted_at: float = 0.0
    started_at: float | None = None
    """When its last attempt was started."""
    finished_at: float | None = None
    not_before_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobQuery:
    """Which records to list, newest first."""

    account: Account | None = None
    states: frozenset[JobState] = frozenset()
    """Empty: all."""
    service: Service | None = None
    limit: int = 50
    before: int | None = None
    """Cursor: only jobs whose arrival number is lower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long and how much of what has ended is kept."""

    ended_seconds: Seconds = 7 * 86_400.0
    ended_jobs_max: int = 100_000
    result_bytes_max: int = 10 * 1024**3
    """Results and bodies together; the oldest ended jobs are forgotten first."""


class Store(Protocol):
    """The verbs. All may raise StoreError when the store itself fails; a refusal is a reply, not an
    exception.
    """

    async def open(self) -> None:
        """Open, migrate to the current format, and load what the store keeps in memory.

        Raises StoreError when the data was written by a newer version or the folder cannot be used.
        """
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of everything. May be called twice."""
        ...

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event from now on (rule 5)."""
        ...

    async def snapshot(self) -> Snapshot:
        """Tell everything a book needs, consistent as of `n`."""
        ...

    # -- submission and its end by the user

    async def enqueue(self, new: NewJob, limits: QueueLimits) -> Reply:
        """Make a job durable and waiting. OK | EXISTS | CONFLICT | FULL | ACCOUNT_FULL.

        EXISTS and CONFLICT look at the job's id, then (account, service, client_job_id), then (account,
        idempotency_key), ended jobs included; `job` and `state` of the reply are those of the existing one.
        """
        ...

    async def cancel(self, job: JobId, failure: Failure | None = None) -> Reply:
        """End a waiting or merely claimed job now (CANCELLED); ask for the end of a running one (CANCELLING).

        ENDED | UNKNOWN otherwise; CANCELLED again when it ended so while it waited. `failure` says why when
        it was not the user (`client_gone`).
        """
        ...

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply:
        """Change band and priority of a waiting job. OK | NOT_WAITING | UNKNOWN."""
        ...

    # -- one attempt

    async def claim(self, request: ClaimRequest) -> Reply:
        """Give the gpu the first candidate that can be had.

        OK (job, token) | LOST | BUSY | DRAINING | HOLD | STALE (another boot, or not a gpu this node
        registered). Of `lowest_f` the band of the claimed job counts.
        """
        ...

    async def start(self, job: JobId, token: Token) -> Reply:
        """Count the attempt and let it begin. OK | EXPIRED | STALE | UNKNOWN."""
        ...

    async def release(self, job: JobId, token: Token, why: str) -> Reply:
        """Give a claim that was not started back; refund its charge. OK | STALE | UNKNOWN."""
        ...

    async def finish(
        self,
        job: JobId,
        token: Token,
        *,
        state: JobState,
        failure: Failure | None,
        used_seconds: Seconds,
        result: bytes | None,
    ) -> Reply:
        """End a started attempt, and the job with it, as `state` (`cancelled` if a cancel is wanted,
        whatever `state`).

        Corrects F from what was charged to `used_seconds`. OK (the recorded state) | STALE | UNKNOWN. An
        expired but unrescued lease does not matter. A *late finish* (the job waits again, or its next attempt
        is only claimed; the token is that of an attempt it made) ends the job if the outcome is success and
        is STALE otherwise. `cancelled` that nobody wanted is recorded as failed; a job that ends otherwise
        than its engine said keeps no result.
        """
        ...

    async def fail(
        self, job: JobId, token: Token, failure: Failure, again: Again, *, used_seconds: Seconds
    ) -> Reply:
        """End a started attempt and let the job wait for another. OK | STALE | UNKNOWN; ends it `cancelled`
        if that is wanted.
        """
        ...

    async def resume(
        self,
        node: NodeId,
        boot: int,
        gpu: GpuId,
        job: JobId,
        token: Token,
        claim: ClaimId,
        lease_seconds: Seconds,
    ) -> Reply:
        """Go on with a started attempt under a new token. OK | GONE | BUSY | UNKNOWN | STALE (boot).

        While the job is running under `token`, its lease valid or over; or once it was rescued and waits, if
        the gpu's slot is empty (BUSY otherwise). The same claim id: the same reply.
        """
        ...

    # -- leases and nodes

    async def register(
        self, node: NodeId, boot: int, gpus: tuple[tuple[GpuId, str], ...], name: str
    ) -> RegisterReply:
        """Make this boot of a node current, with its gpus and their UUIDs.

        OK | TAKEN (another node that is seen has one of them) | STALE (an older boot).
        """
        ...

    async def leave(self, node: NodeId, boot: int) -> Reply:
        """Take a node without claims off the list. OK | BUSY | STALE."""
        ...

    async def beat(
        self,
        node: NodeId,
        boot: int,
        seen_seconds: Seconds,
        lease_seconds: Seconds,
        leases: tuple[tuple[JobId, Token], ...],
    ) -> BeatReply:
        """Say that the node lives and renew its leases. Appends no event."""
        ...

    async def expire(self, job: JobId, token: Token) -> Reply:
        """Mark an attempt whose lease is over as suspect; give a claim that was not started back. OK |
        NOT_DUE | STALE.
        """
        ...

    async def rescue(self, job: JobId, token: Token, grace_seconds: Seconds) -> Reply:
        """Take a suspect whose grace is over from its node: it waits again, or ends. OK | NOT_DUE | STALE."""
        ...

    # -- steering

    async def drain(self, gpu: GpuId, draining: bool) -> Reply:
        """Let a gpu take nothing new, or take work again. Holds from the reply on, and over restarts."""
        ...

    async def pause(self, paused: bool) -> Reply:
        """Start nothing at all, or start again. Holds over restarts."""
        ...

    # -- reading

    async def job(self, job: JobId) -> JobRecord | None: ...

    async def job_of_client(
        self, account: Account, service: Service, client_job_id: str
    ) -> JobRecord | None: ...

    async def jobs(self, query: JobQuery) -> tuple[JobRecord, ...]: ...

    async def body(self, job: JobId) -> bytes | None: ...

    async def result(self, job: JobId) -> bytes | None: ...

    async def forget(self, job: JobId) -> Reply:
        """Remove an ended record with its body and result. OK | UNKNOWN | BUSY (not ended)."""
        ...

    async def prune(self, retention: Retention) -> tuple[JobId, ...]:
        """Forget ended jobs beyond the retention, at most 500 at a time; returns whose files may go too."""
        ...
