"""The engine port: what the dispatcher asks of an engine, whatever its service. Types and prose;
implementations beside it.

The one rule behind all of it: a gpu is occupied from before the first byte of a job reaches an engine until
the engine is *known* idle. `run`, `follow` and `interrupt` therefore never return because a client left, a
timer ran out or a socket broke: they return when the engine's own word says that it is idle, or with
`engine_idle=False` when the engine does not answer any more; then the gpu stays occupied until probes have
answered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

import msgspec

from gpulane.adapters.base import EngineRequest, HeaderList
from gpulane.core.model import NO_MODEL, EngineUrl, Failure, Job, JobId, JobState, ModelKey, Seconds, Service
from gpulane.engine.progress import ProgressHub
from gpulane.errors import EngineError

REFUSED: Final = "connect_refused"
"""Code of an EngineError: no process listens at the address."""
UNREACHABLE: Final = "unreachable"
"""Code of an EngineError: no connection came about, which proves nothing of the engine."""
CANNOT_UNLOAD: Final = "cannot_unload"
"""Code of an EngineError: nothing is known that would make this engine give its memory back."""
BUSY: Final = "engine_busy"
"""Code of an EngineError: an order for an idle engine was not sent, since something runs there."""


def is_refused(error: EngineError) -> bool:
    """Tell whether the connection was refused: nobody listens there. An unreachable host may be at work."""
    return error.code == REFUSED


class AnswerSink(Protocol):
    """Where the engine's answer to a held job goes. Writing never waits for the client
    (`relay.answer.HeldAnswer`).
    """

    def begin(self, status: int, headers: HeaderList) -> None: ...

    def write(self, chunk: bytes) -> None:
        """Raise EngineError (ResponseTooLarge) or StoreError when it cannot be kept."""
        ...

    def finish(self) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass(slots=True, kw_only=True)
class AttemptContext:
    """One attempt as the engine client sees it. Mutable only through its events."""

    job: Job
    request: EngineRequest
    meta: bytes
    hub: ProgressHub
    answer: AnswerSink | None = None
    """For held jobs; None for stored ones, whose answer comes back in the outcome."""
    cancel_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the user no longer wants the job: interrupt exactly this job, wait until the engine is idle,
    return."""


class Artifact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of a result."""

    name: str
    content_type: str = "application/octet-stream"
    target: str | None = None
    """Where the engine serves it (origin-form); None when the file is inside the document."""
    bytes: int | None = None
    node: str | None = None
    """The part of the workflow that made it."""


class RecordedResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of a finished stored job: the engine's own answer, and what files belong to it."""

    document: msgspec.Raw
    """The engine's answer as JSON: ComfyUI's history entry, A1111's answer body."""
    status: int = 200
    engine: str = ""
    artifacts: tuple[Artifact, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended: data, never an exception."""

    state: JobState
    """SUCCEEDED, FAILED (then `failure` is set) or CANCELLED (interrupted because it was wanted)."""
    failure: Failure | None = None
    result: RecordedResult | None = None
    model: ModelKey = NO_MODEL
    """The model that the engine proved to hold at the end; NO_MODEL when it did not tell."""
    service_seconds: Seconds = 0.0
    load_seconds: Seconds | None = None
    """Measured when the model was loaded for this job; None when it was warm or could not be told apart."""
    engine_idle: bool = True
    """Whether the engine is known idle. False: occupancy goes on until probes say so."""


class Found(StrEnum):
    """What an engine knows of a job, asked queue first, then history, then queue again."""

    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    ABSENT = "absent"
    BUSY = "busy"
    """The engine works on something it cannot name (A1111 without /internal): may be this job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """One answered probe."""

    idle: bool
    """Nothing runs and nothing waits in the engine."""
    strange_jobs: tuple[str, ...] = ()
    """Ids of work in the engine that the caller did not name as its own: somebody bypassed the gateway."""
    model: ModelKey | None = None
    """What is loaded, where the engine tells; None: it does not tell."""
    vram_bytes_free: int | None = None
    vram_bytes_total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an engine says of itself; fetched when it becomes ready and refreshed now and then."""

    service: Service
    flavor: str
    """`comfyui`, `a1111`, `forge`, `sdnext`, `http` ..."""
    version: str
    offers: frozenset[str] | None
    documents: dict[str, bytes]
    """Raw JSON answers that front doors merge: `object_info`, `sd-models`, `samplers`, `system_stats` ..."""
    digest: str
    """Digest of what it offers: changes exactly when that changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vram:
    """Memory of the whole card as one engine or the driver tells it. Unknown is None, never zero."""

    bytes_free: int | None = None
    bytes_total: int | None = None


class ServiceClient(Protocol):
    """One engine. Implementations: ComfyUIClient, A1111Client, HttpServiceClient."""

    @property
    def url(self) -> EngineUrl: ...

    @property
    def service(self) -> Service: ...

    async def open(self) -> None:
        """Start what must always run (ComfyUI: the one event socket, read at all times). Idempotent."""
        ...

    async def close(self) -> None: ...

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        """Ask whether the engine lives and is idle. Raises EngineError when it does not answer in time.

        `own` are the jobs that this gateway has in it. `fresh` uses a new connection (restart rule: quiet
        first).
        """
        ...

    def known_idle(self) -> bool | None:
        """Tell from what the engine has pushed whether it is idle now; None: it pushes nothing (or not now),
        so ask.
        """
        ...

    async def describe(self) -> Description:
        """Fetch what it is and offers. Raises EngineError."""
        ...

    async def unload(self) -> None:
        """Command the engine to give its VRAM back; returns when it has acknowledged.

        The acknowledgment says nothing: the caller measures. Never sent while anything runs in the engine
        (code `engine_busy`). Raises EngineError, also for an engine that cannot be told (`cannot_unload`).
        """
        ...

    async def make_loadable(self) -> None:
        """Send what a job after an `unload` needs first (A1111: reload-checkpoint). Does nothing elsewhere.

        Sends nothing when nothing is needed, so it may be called before any job. Never sent while anything
        runs (`engine_busy`). Raises EngineError.
        """
        ...

    async def vram(self) -> Vram:
        """Measure the memory of the engine's card. Raises EngineError when it does not answer."""
        ...

    async def canary(self) -> bool:
        """Prove that the part that computes is alive (ComfyUI: a tiny prompt). True where no such proof
        exists.
        """
        ...

    async def run(self, attempt: AttemptContext) -> Outcome:
        """Send the job and follow it until the engine is idle. Never raises for what an engine or client
        does.
        """
        ...

    async def find(self, job: JobId, *, fresh: bool = True) -> Found:
        """Look for a job after a restart. Raises EngineError when the engine does not answer."""
        ...

    async def follow(self, attempt: AttemptContext) -> Outcome:
        """Go on with a job that the engine has already: no byte of it is sent again."""
        ...

    async def erase(self, job: JobId) -> None:
        """Remove an older record of this id from the engine and see it gone. Raises EngineError."""
        ...

    async def interrupt(self, job: JobId) -> None:
        """Stop exactly this job, waiting or running; nobody else's. Raises EngineError."""
        ...
