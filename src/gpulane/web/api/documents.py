"""The native API's JSON, as types: what is read, answered and streamed; openapi.json is made of them.

Fields are only ever added. Times are RFC 3339 UTC, durations seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

BandName = Literal["interactive", "normal", "batch"]
Priority = Annotated[
    int | BandName,
    Meta(description="A band by name, or an order among the account's own jobs in their band: higher first."),
]
StateName = Literal["queued", "running", "waiting_retry", "succeeded", "failed", "cancelled"]


class NewJobRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A job to be done."""

    service: Literal["comfyui", "a1111"]
    workflow: (
        Annotated[msgspec.Raw, Meta(description="comfyui: the workflow in API format.")] | msgspec.UnsetType
    ) = msgspec.UNSET
    endpoint: Annotated[str, Meta(description="a1111: txt2img, img2img ...", max_length=100)] = ""
    payload: (
        Annotated[msgspec.Raw, Meta(description="a1111: the body for that endpoint.")] | msgspec.UnsetType
    ) = msgspec.UNSET
    priority: Priority = "normal"
    labels: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...],
        Meta(description="Labels that the GPU must carry.", max_length=32),
    ] = ()
    max_attempts: Annotated[int, Meta(ge=1, le=20)] | None = None
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    webhook: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    deadline_seconds: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class LockRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A GPU for another program."""

    gpu: Annotated[str, Meta(description="NODE/NAME or NAME; null: any.", max_length=200)] | None = None
    labels: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...],
        Meta(description="Labels that the GPU must carry.", max_length=32),
    ] = ()
    priority: Priority = "normal"
    seconds_max: Annotated[float, Meta(description="How long it may be held.", gt=0)] = 3600.0
    note: Annotated[str, Meta(description="What for; shown to people.", max_length=200)] = ""


class JobChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What may be changed of a waiting job."""

    priority: Priority


class ReasonDocument(msgspec.Struct, kw_only=True):
    """Why a job waits."""

    code: str
    text: str
    args: dict[str, object]


class ErrorDocument(msgspec.Struct, kw_only=True):
    """What went wrong with a job or an attempt."""

    code: str
    message: str


class ProgressDocument(msgspec.Struct, kw_only=True):
    """How far a running job is."""

    value: float
    max: float | None = None
    text: str | None = None


class AttemptDocument(msgspec.Struct, kw_only=True):
    """One try at running a job."""

    number: int
    gpu: str
    node: str
    engine: str
    state: str
    claimed_at: str
    started_at: str | None
    ended_at: str | None
    error: ErrorDocument | None


class JobDocument(msgspec.Struct, kw_only=True):
    """A job, as it is now."""

    id: str
    service: str
    kind: str
    user: str
    state: StateName
    cancel_wanted: bool
    position: int | None
    reason: ReasonDocument | None
    estimated_start_seconds: tuple[float, float] | None
    gpu: str | None
    node: str | None
    engine: str | None
    model: str | None
    band: BandName
    priority: int
    labels: list[str]
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: ProgressDocument | None
    attempts: list[AttemptDocument]
    error: ErrorDocument | None


class JobList(msgspec.Struct, kw_only=True):
    """One page of jobs, newest first."""

    jobs: list[JobDocument]
    next_cursor: str | None


class ArtifactDocument(msgspec.Struct, kw_only=True):
    """One file of a result."""

    number: int
    name: str
    content_type: str
    bytes: int | None
    node: str | None
    url: str


class ArtifactList(msgspec.Struct, kw_only=True):
    """The files of a result."""

    artifacts: list[ArtifactDocument]


class EngineDocument(msgspec.Struct, kw_only=True):
    """One engine."""

    url: str
    service: str
    name: str
    state: str
    why: str
    model: str | None
    flavor: str | None
    version: str | None


class ProcessDocument(msgspec.Struct, kw_only=True):
    """The process of an engine that gpulane starts."""

    state: Literal["starting", "ready", "stopped", "backing_off"]
    why: str
    pid: int | None
    restarts: int
    since: str
    """When it came into this state."""
    exit_status: int | None
    """Of the process before this one; negative: the signal that ended it."""
    is_adopted: bool
    """An earlier gpulane started it."""


class EngineDetail(EngineDocument, kw_only=True):
    """One engine with its GPU and its process."""

    gpu: str
    can_restart: bool
    process: ProcessDocument | None
    """None: somebody else starts it."""


class EngineList(msgspec.Struct, kw_only=True):
    """All engines."""

    engines: list[EngineDetail]


class EngineRestart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An engine to be restarted."""

    url: Annotated[str, Meta(min_length=1, max_length=500)]
    force: Annotated[bool, Meta(description="Also while a job runs there, which is lost by it.")] = False


class VramDocument(msgspec.Struct, kw_only=True):
    """Memory of a GPU, all programs together; None where nobody tells."""

    bytes_total: int | None
    bytes_free: int | None


class GpuDocument(msgspec.Struct, kw_only=True):
    """One GPU with its engines."""

    id: str
    name: str
    uuid: str
    node: str
    state: Literal["idle", "busy", "handoff", "draining", "lost"]
    why: str
    job: str | None
    engines: list[EngineDocument]
    vram: VramDocument
    labels: list[str]
    utilization_percent: float | None = None
    """By the driver; null where it does not tell."""
    temperature_celsius: float | None = None
    power_watts: float | None = None


class GpuList(msgspec.Struct, kw_only=True):
    """All GPUs."""

    gpus: list[GpuDocument]


class QueueDocument(msgspec.Struct, kw_only=True):
    """Counts."""

    waiting: int
    running: int
    paused: bool
    waiting_by_service: dict[str, int]


class RefusalDetail(msgspec.Struct, kw_only=True):
    """Why a request was refused."""

    code: str
    message: str
    hint: str | None


class Refusal(msgspec.Struct, kw_only=True):
    """Every error of this API."""

    error: RefusalDetail


# --- messages of the streams: `event:` is the kind, `data:` one of these


class JobMessage(msgspec.Struct, kw_only=True):
    """`job`: the whole job, at the beginning, after a gap and at its end."""

    v: int = 1
    job: JobDocument


class StateMessage(msgspec.Struct, kw_only=True):
    """`state`: something happened to a job."""

    v: int = 1
    id: str
    what: str
    """submitted, claimed, started, released, attempt_failed, cancel_wanted, prioritised, resumed,
    lease_expired or ended."""
    state: StateName | None
    gpu: str | None = None
    error: ErrorDocument | None = None
    service: str | None = None
    kind: str | None = None
    user: str | None = None
    model: str | None = None


class PositionMessage(msgspec.Struct, kw_only=True):
    """`position`: where a waiting job stands."""

    v: int = 1
    id: str
    position: int | None
    reason: ReasonDocument | None
    estimated_start_seconds: tuple[float, float] | None


class ProgressMessage(msgspec.Struct, kw_only=True):
    """`progress`: how far a running job is."""

    v: int = 1
    id: str
    value: float
    max: float | None
    text: str | None


class PreviewMessage(msgspec.Struct, kw_only=True):
    """`preview`: a picture of a running job, in base64."""

    v: int = 1
    id: str
    content_type: str
    data: str


class GpusMessage(msgspec.Struct, kw_only=True):
    """`gpus`: all of them, at the beginning and whenever one changes."""

    v: int = 1
    gpus: list[GpuDocument]


class QueueMessage(msgspec.Struct, kw_only=True):
    """`queue`: the counts, at the beginning and whenever they change; `reload` after a gap."""

    v: int = 1
    queue: QueueDocument
    reload: bool = False
    """Facts were missed: ask for the jobs again."""
