"""What has happened, in the past tense, one class per fact.

Two sources. *Store events* carry `n`, the store's dense event number, and tell what became of jobs: every
node sees the same ones in the same order. *Local events* tell what this process learned of gpus and engines
(probes, claims under way) and of the clients that wait here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpulane.core.model import (
    Account,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    Gpu,
    GpuId,
    Job,
    JobId,
    JobState,
    ModelKey,
    NodeId,
    Seconds,
    Service,
    Token,
)

# --- store events: facts about jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted:
    """A job became durable and waits. Its account's F was lifted to V if it had nothing waiting in the band
    (M1).
    """

    n: int
    job: Job
    account_f: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClaimed:
    """A waiting job was given to a gpu for one attempt; nothing was sent to an engine yet."""

    n: int
    job: JobId
    gpu: GpuId
    node: NodeId
    token: Token
    claim: ClaimId
    account_f: float
    """The account's F in the job's band after the charge."""
    band_v: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """The attempt was started: from here on the engine may compute, and the attempt counts."""

    n: int
    job: JobId
    token: Token
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReleased:
    """A claim that was not started was given back; the charge was refunded."""

    n: int
    job: JobId
    token: Token
    account_f: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """An attempt failed and another will be made: the job waits again."""

    n: int
    job: JobId
    token: Token
    failure: Failure
    avoid: frozenset[GpuId]
    """All gpus this job keeps away from while another is eligible."""
    not_before_seconds: Seconds
    """How long from now the job rests before the next attempt."""
    account_f: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """A job reached its end state. Recorded once."""

    n: int
    job: JobId
    state: JobState
    account_f: float
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelWanted:
    """A running job was cancelled: it can only end `cancelled` now, once its engine is idle."""

    n: int
    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPrioritised:
    """A waiting job's priority was changed."""

    n: int
    job: JobId
    band: Band
    priority: int
    account_f: float
    """Its account's F in the (possibly new) band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptResumed:
    """An attempt whose process died goes on under a new token."""

    n: int
    job: JobId
    gpu: GpuId
    node: NodeId
    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseExpired:
    """The holder of an attempt did not renew its lease: a suspect, not yet rescued."""

    n: int
    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDrained:
    """A gpu finishes what runs and takes nothing new (`draining` True), or takes work again (False)."""

    n: int
    gpu: GpuId
    draining: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePaused:
    """No job is started until unpaused (`paused` False)."""

    n: int
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChanged:
    """A node joined (`present`) with its gpus, or left."""

    n: int
    node: NodeId
    present: bool


StoreEvent = (
    JobSubmitted
    | JobClaimed
    | JobStarted
    | JobReleased
    | AttemptFailed
    | JobEnded
    | CancelWanted
    | JobPrioritised
    | AttemptResumed
    | LeaseExpired
    | GpuDrained
    | QueuePaused
    | NodeChanged
)

# --- local events: facts about gpus, engines and claims under way


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAdded:
    """A gpu is known, with its engines, none of them ready yet."""

    gpu: Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRemoved:
    """A gpu is gone from the settings."""

    gpu: GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """An engine answered its probes and told what it offers."""

    engine: EngineUrl
    offers: frozenset[str] | None
    """None: it does not tell; every need counts as met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost:
    """An engine missed its probes, or was proved a zombie."""

    engine: EngineUrl
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLeaking:
    """An engine did not give its VRAM back when told to, twice (`leaking`), or has done so since (False)."""

    engine: EngineUrl
    leaking: bool
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VramMeasured:
    """A job of this model needed so much of the card at its peak, other engines' memory left out."""

    gpu: GpuId
    service: Service
    model: ModelKey
    bytes_peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUnloaded:
    """An engine of the gpu was told to unload, and the memory was seen to come free."""

    gpu: GpuId
    engine: EngineUrl


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOccupied:
    """A gpu is occupied for a reason other than a claim: a stranger's work, recovery after a restart, an
    orphan, a hand-off.
    """

    gpu: GpuId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFreed:
    """That reason is over: all engines of the gpu are known idle."""

    gpu: GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSeen:
    """An engine of the gpu holds this model now (proved by an answer or a probe); NO_MODEL: unknown or
    none.
    """

    gpu: GpuId
    engine: EngineUrl
    model: ModelKey


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasured:
    """Loading a model took this long, a hand-off before it left out."""

    gpu: GpuId
    model: ModelKey
    seconds: Seconds
    service: Service | None = None
    """Of which service: lets models that were never measured fall back on their likes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffMeasured:
    """A hand-off is over: these engines of the gpu were unloaded, the others kept what they held."""

    gpu: GpuId
    seconds: Seconds
    unloaded: tuple[EngineUrl, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMeasured:
    """The memory of the card in all, as the driver or an engine tells it."""

    gpu: GpuId
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPaused:
    """A gpu is left alone for so long because attempts keep failing there (`core.breaker`); 0: no more."""

    gpu: GpuId
    seconds: Seconds
    failures: int = 0
    """Failed attempts in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceMeasured:
    """Serving a job took this long, its load left out."""

    job: Job
    gpu: GpuId
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimProposed:
    """A StartAttempt is being carried out: gpu and jobs are pending until JobClaimed or ClaimLost."""

    gpu: GpuId
    jobs: tuple[JobId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLost:
    """The store refused the claim: nothing of it is pending any more."""

    gpu: GpuId
    rest_seconds: Seconds = 0.0
    """Leave this gpu alone for so long (a hold, an unknown token in its slot)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderAway:
    """The client of a held job left (`away`), or came back: the job keeps its place, but is not started
    meanwhile.
    """

    job: JobId
    away: bool


LocalEvent = (
    GpuAdded
    | GpuRemoved
    | EngineReady
    | EngineLost
    | EngineLeaking
    | EngineUnloaded
    | VramMeasured
    | GpuOccupied
    | GpuFreed
    | ModelSeen
    | LoadMeasured
    | HandoffMeasured
    | CardMeasured
    | GpuPaused
    | ServiceMeasured
    | ClaimProposed
    | ClaimLost
    | HolderAway
)

Event = StoreEvent | LocalEvent


# --- the whole picture, from which a book starts


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A job that waits, with what its earlier attempts left behind."""

    job: Job
    attempts: int = 0
    avoid: frozenset[GpuId] = frozenset()
    not_before_seconds: Seconds = 0.0
    """How long from the snapshot it still rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveJob:
    """A job under a claim, started or not."""

    job: Job
    gpu: GpuId
    node: NodeId
    token: Token
    started: bool
    cancel_wanted: bool
    attempts: int = 0
    avoid: frozenset[GpuId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the store knows that a book needs, as of event `n`."""

    n: int
    waiting: tuple[WaitingJob, ...]
    active: tuple[ActiveJob, ...]
    account_f: tuple[tuple[Band, Account, float], ...]
    band_v: tuple[tuple[Band, float], ...]
    draining: frozenset[GpuId]
    paused: bool
