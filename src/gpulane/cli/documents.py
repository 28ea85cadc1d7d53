"""The native API's documents as the command line reads them: fields that it does not know are passed over."""

from __future__ import annotations

import msgspec


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """Something the gateway answers."""


class Refused(Document, frozen=True):
    """What was wrong with a request."""

    code: str
    message: str
    hint: str | None = None


class Refusal(Document, frozen=True):
    """The shape of every error."""

    error: Refused


class Reason(Document, frozen=True):
    """Why a job waits."""

    code: str
    text: str


class Error(Document, frozen=True):
    """What went wrong with a job or an attempt."""

    code: str
    message: str


class Progress(Document, frozen=True):
    """How far a running job is."""

    value: float
    max: float | None = None
    text: str | None = None


class Attempt(Document, frozen=True):
    """One try at running a job."""

    number: int
    gpu: str
    state: str
    engine: str = ""
    error: Error | None = None


class Job(Document, frozen=True):
    """A job, as it is now."""

    id: str
    state: str
    service: str = ""
    kind: str = ""
    user: str = ""
    cancel_wanted: bool = False
    position: int | None = None
    reason: Reason | None = None
    estimated_start_seconds: tuple[float, float] | None = None
    gpu: str | None = None
    engine: str | None = None
    model: str | None = None
    band: str = "normal"
    priority: int = 0
    labels: tuple[str, ...] = ()
    created_at: str = ""
    started_at: str | None = None
    finished_at: str | None = None
    progress: Progress | None = None
    attempts: tuple[Attempt, ...] = ()
    error: Error | None = None

    @property
    def is_ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}


class JobList(Document, frozen=True):
    """One page of jobs, newest first."""

    jobs: tuple[Job, ...]
    next_cursor: str | None = None


class Artifact(Document, frozen=True):
    """One file of a result."""

    number: int
    name: str
    content_type: str = ""
    bytes: int | None = None


class ArtifactList(Document, frozen=True):
    """The files of a result."""

    artifacts: tuple[Artifact, ...]


class Engine(Document, frozen=True):
    """One engine."""

    url: str
    service: str
    state: str
    name: str = ""
    why: str = ""
    model: str | None = None
    version: str | None = None


class Process(Document, frozen=True):
    """The process of an engine that gpulane starts."""

    state: str
    why: str = ""
    pid: int | None = None
    restarts: int = 0
    since: str = ""


class EngineDetail(Engine, frozen=True):
    """One engine with its GPU and its process."""

    gpu: str = ""
    process: Process | None = None


class EngineList(Document, frozen=True):
    """All engines."""

    engines: tuple[EngineDetail, ...]


class Vram(Document, frozen=True):
    """Memory of a GPU."""

    bytes_total: int | None = None
    bytes_free: int | None = None


class Gpu(Document, frozen=True):
    """One GPU with its engines."""

    id: str
    name: str
    state: str
    node: str = ""
    why: str = ""
    job: str | None = None
    engines: tuple[Engine, ...] = ()
    vram: Vram = Vram()
    labels: tuple[str, ...] = ()


class GpuList(Document, frozen=True):
    """All GPUs."""

    gpus: tuple[Gpu, ...]


class Queue(Document, frozen=True):
    """Counts."""

    waiting: int = 0
    running: int = 0
    paused: bool = False


# --- messages of a job's stream


class JobMessage(Document, frozen=True):
    """The whole job."""

    job: Job


class StateMessage(Document, frozen=True):
    """Something happened to a job."""

    id: str
    what: str = ""
    state: str | None = None
    gpu: str | None = None


class PositionMessage(Document, frozen=True):
    """Where a waiting job stands."""

    id: str
    position: int | None = None
    reason: Reason | None = None
    estimated_start_seconds: tuple[float, float] | None = None


class ProgressMessage(Document, frozen=True):
    """How far a running job is."""

    id: str
    value: float
    max: float | None = None
    text: str | None = None
