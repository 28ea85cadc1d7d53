"""The nouns: jobs, attempts, engines, gpus, their ids and states. Frozen data; nothing here decides or
changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, NewType

Seconds = float
"""Seconds of a monotonic clock, or a duration. Wall-clock times are called `..._at` and are seconds since
1970, UTC."""

JobId = NewType("JobId", str)
"""A canonical lowercase UUID4. Engines see it as prompt_id or force_task_id, so that a job can be found
again in an engine."""
Account = NewType("Account", str)
"""Whom a job is charged to. Fairness, ids, uploads, options, history and progress are scoped by it."""
NodeId = NewType("NodeId", str)
"""One machine of the fleet: random, made once, kept in its data folder."""
GpuId = NewType("GpuId", str)
"""`node name/gpu name`, for people and paths. What must not be claimed twice is the gpu's UUID."""
EngineUrl = NewType("EngineUrl", str)
"""An engine's base URL without a trailing slash: its identity."""
ModelKey = NewType("ModelKey", str)
"""The heavy model a job needs, as loaded (checkpoint and what is loaded with it). NO_MODEL when it needs
none or it is unknown."""
Token = NewType("Token", str)
"""Fencing token of an attempt, `<n>.<claim id>`. The store refuses writes that carry another one. Compared
as a whole."""
ClaimId = NewType("ClaimId", str)
"""64 random bits in hex, made by whoever claims; a claim repeated with the same id gets the same answer."""

NO_MODEL: Final = ModelKey("")


class Service(StrEnum):
    """A kind of engine."""

    COMFYUI = "comfyui"
    A1111 = "a1111"
    """AUTOMATIC1111, Forge, SD.Next: whatever answers /sdapi/v1."""
    HTTP = "http"
    """Any HTTP server whose job paths the settings name."""
    LOCK = "lock"
    """Any other program, for as long as it holds the gpu (`gpulane lock`). Every gpu has one such engine."""


class Band(IntEnum):
    """Priority bands: a lower number goes first, always."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class JobState(StrEnum):
    """Where a job is. Each says who moves it on."""

    QUEUED = "queued"
    """Waiting, or claimed but not started. The dispatcher moves it on by claim and start; its user by
    cancel."""
    RUNNING = "running"
    """An attempt was started on an engine. Its node moves it on by finish or fail; the sweep by rescue."""
    WAITING_RETRY = "waiting_retry"
    """An attempt failed, another will be made. Moved on like QUEUED, once `not_before` has passed."""
    SUCCEEDED = "succeeded"
    """Ended: the engine's answer is recorded. Nobody moves it; pruned with age."""
    FAILED = "failed"
    """Ended: no further attempt. Nobody moves it; pruned with age."""
    CANCELLED = "cancelled"
    """Ended: its user, or the loss of its client, ended it. Nobody moves it; pruned with age."""


ENDED: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
WAITING: Final = frozenset({JobState.QUEUED, JobState.WAITING_RETRY})


class AttemptState(StrEnum):
    """Where an attempt is."""

    CLAIMED = "claimed"
    """Granted by the store; no byte has reached an engine. Ends by start, release or rescue."""
    STARTED = "started"
    """The engine may be computing. Ends by finish, fail or rescue."""
    FINISHED = "finished"
    FAILED = "failed"
    LOST = "lost"
    """Its lease ran out, or its engine forgot it."""


class EngineState(StrEnum):
    """What the probe knows of an engine. `engine.probe` alone moves it."""

    STARTING = "starting"
    """Not answered yet since we know it."""
    READY = "ready"
    LEAKING = "leaking"
    """Works, but did not give back VRAM when told to."""
    LOST = "lost"
    """Missed several probes in a row, or proved a zombie."""
    STOPPED = "stopped"
    """Stopped on purpose."""


class HandoffMode(StrEnum):
    """Whether an engine unloads its models before another engine of its card runs."""

    AUTO = "auto"
    """When both are not known to fit."""
    ALWAYS = "always"
    NEVER = "never"


class GpuState(StrEnum):
    """What is shown of a gpu; computed from the book, never stored."""

    IDLE = "idle"
    BUSY = "busy"
    HANDOFF = "handoff"
    DRAINING = "draining"
    LOST = "lost"


class FailureKind(StrEnum):
    """What a failed attempt proves. `core.retry` turns it into a decision."""

    NOT_STARTED = "not_started"
    """It is proved that nothing was computed (refused connection, refused body before the queue)."""
    LOST = "lost"
    """The engine no longer knows the job: it restarted or died."""
    ENGINE = "engine"
    """The engine reported an error of its own (out of memory, a node raised)."""
    CLIENT = "client"
    """The engine refused the job's content: no other gpu will like it better."""
    INTERRUPTED = "interrupted"
    """Something interrupted it that nobody here asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt failed: data for retry, people and the record."""

    kind: FailureKind
    code: str
    """Stable, snake_case: `out_of_memory`, `engine_lost`, `connect_failed`, `poisoned`, `client_gone` ..."""
    message: str
    killed_engine: bool = False
    """The engine died or hung while this attempt ran: counts towards quarantine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The size of a job, as far as the request tells."""

    steps: int = 1
    pixels: int = 1
    images: int = 1

    @property
    def amount(self) -> float:
        """Steps x pixels x images: what service seconds are proportional to."""
        return float(self.steps) * self.pixels * self.images


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the scheduler needs to know of a job; fixed at submission (except what the book keeps beside
    it).
    """

    id: JobId
    account: Account
    service: Service
    kind: str
    """`prompt`, `txt2img`, `img2img`, ... : the service's own word for this sort of work; for people and
    estimates."""
    model: ModelKey = NO_MODEL
    signature: str = ""
    """Digest of the workflow's shape (node classes and wiring, or the endpoint): jobs alike take alike
    long."""
    work: Work = field(default_factory=Work)
    needs: frozenset[str] = frozenset()
    """What an engine must offer: `node:KSampler`, `CheckpointLoaderSimple.ckpt_name=x.safetensors`,
    `checkpoint:x` ..."""
    labels: frozenset[str] = frozenset()
    """Labels the gpu must carry."""
    engine: EngineUrl | None = None
    """Pinned to one engine (an `http` service, a sticky page)."""
    band: Band = Band.NORMAL
    priority: int = 0
    """Orders the account's own jobs inside a band: higher first."""
    weight: float = 1.0
    """The account's share; charges are divided by it."""
    held: bool = False
    """The client's request waits for the answer; never run again after a restart."""
    holder: str = ""
    """`node.boot` of the process whose client waits, for held jobs."""
    max_attempts: int = 3
    rerun_lost: bool = True
    """Whether an attempt that vanished with its engine may be made again."""
    arrival: int = 0
    """Event number of its submission: the order of arrival. Set by the store."""
    submitted_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One running ComfyUI, A1111 or other server, sitting on a gpu."""

    url: EngineUrl
    service: Service
    name: str = ""
    """Only for `http` services: the NAME of /svc/NAME/."""
    handoff: HandoffMode = HandoffMode.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, with the engines that share it."""

    id: GpuId
    node: NodeId
    name: str
    uuid: str
    """NVML's, else a digest of the sorted engine URLs (and the node where they are loopback URLs)."""
    engines: tuple[Engine, ...]
    vram_bytes: int | None = None
    """None is unknown, never zero."""
    labels: frozenset[str] = frozenset()
    speed: float = 1.0
    warm_together: frozenset[frozenset[EngineUrl]] = frozenset()
    """Sets of its engines that may keep their models at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a start costs its account, in GPU-seconds: charged at the claim, corrected at the end."""

    service_seconds: Seconds
    load_seconds: Seconds

    @property
    def total(self) -> Seconds:
        return self.service_seconds + self.load_seconds
