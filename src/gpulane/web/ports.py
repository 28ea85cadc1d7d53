"""What the front doors ask of the running gateway. `service` hands in the objects; the web never imports the
dispatcher.

All methods may raise the ClientErrors named; what they mean for a client is put into words by each front
door.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from aiohttp import web

from gpulane.adapters.base import EngineRequest
from gpulane.config import Settings
from gpulane.core.model import Account, Band, EngineUrl, GpuId, JobId, Service
from gpulane.engine.base import RecordedResult
from gpulane.engine.lock import Grants
from gpulane.engine.process import ProcessView
from gpulane.engine.progress import ProgressHub
from gpulane.relay.answer import HeldAnswer
from gpulane.store.base import JobQuery, JobRecord, Listener, NewJob, Reply
from gpulane.views import EngineView, GpuView, HeldCall, Place, QueueView, Reason
from gpulane.wire.client import EngineClient

__all__ = [
    "EngineView",
    "EnginesPort",
    "Front",
    "GpuView",
    "HeldCall",
    "Identity",
    "JobsPort",
    "Place",
    "ProcessView",
    "ProcessesPort",
    "QueueView",
    "Reason",
    "Role",
    "ValuesPort",
    "WebContext",
]


class Role(StrEnum):
    """What a request may do; each may do what the one before may."""

    VIEWER = "viewer"
    USER = "user"
    OPERATOR = "operator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a request comes from."""

    account: Account
    role: Role
    weight: float = 1.0
    address: str = ""
    """The client's address, after trusted proxies."""


class JobsPort(Protocol):
    """Jobs, as far as front doors may touch them. Scoping by account is the front door's duty."""

    @property
    def hub(self) -> ProgressHub: ...

    async def submit(self, new: NewJob, request: EngineRequest) -> Reply:
        """Admit and store a job; durable on return. OK or EXISTS. Raises Impossible, Throttled, Conflict,
        Unavailable.

        `new.body` stays None: the gateway makes it from `request`.
        """
        ...

    async def hold(self, new: NewJob, request: EngineRequest) -> HeldCall:
        """Admit a job whose client waits. Raises as submit does. An identical call of the account is
        joined.
        """
        ...

    def answered(self, job: JobId) -> None:
        """Say that the client of a held call has its whole answer, so that nothing need be kept for it."""
        ...

    def leave(self, job: JobId) -> None:
        """Say that the client of a held call went away (each joined client says it once)."""
        ...

    def held_answer(self, job: JobId) -> HeldAnswer | None:
        """Find the answer of a held call, running or kept for a client that left."""
        ...

    async def cancel(self, job: JobId) -> Reply: ...

    async def prioritise(self, job: JobId, band: Band, priority: int) -> Reply: ...

    async def record(self, job: JobId) -> JobRecord | None: ...

    async def record_of_client(
        self, account: Account, service: Service, client_job_id: str
    ) -> JobRecord | None: ...

    async def records(self, query: JobQuery) -> tuple[JobRecord, ...]: ...

    async def body(self, job: JobId) -> bytes | None: ...

    async def result(self, job: JobId) -> RecordedResult | None: ...

    async def artifact(self, job: JobId, number: int) -> Path | None:
        """Find the copied file of an artifact; None when it is not (or not yet, or no longer) in the data
        folder.
        """
        ...

    async def forget(self, job: JobId) -> Reply:
        """Remove an ended job from history with its files."""
        ...

    def place(self, job: JobId) -> Place: ...

    def gpus(self) -> tuple[GpuView, ...]: ...

    def queue(self) -> QueueView: ...

    async def drain(self, gpu: GpuId, draining: bool) -> Reply: ...

    async def pause(self, paused: bool) -> Reply: ...

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Hear every store event from now on, at once and without waiting; returns what ends that."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken (not while draining for the end)."""
        ...


class EnginesPort(Protocol):
    """Engines, as far as front doors relay to them."""

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        """All engines (of a service), in the order of the settings."""
        ...

    def wire(self, engine: EngineUrl) -> EngineClient:
        """The pooled client to an engine of the settings."""
        ...

    def sticky(self, service: Service, key: str) -> EngineView | None:
        """The live engine that the requests of this key (an account, a page) go to; None when none is
        live.
        """
        ...


class ProcessesPort(Protocol):
    """The processes of engines, as far as operators may look at them and restart them."""

    def process(self, url: EngineUrl) -> ProcessView | None:
        """Show an engine's process; None when somebody else starts it. Raises NotFound."""
        ...

    def can_restart(self, url: EngineUrl) -> bool: ...

    async def last_lines(self, url: EngineUrl, lines: int) -> list[str]:
        """Read the end of an engine's output. Raises NotFound."""
        ...

    async def restart(self, url: EngineUrl, why: str, *, force: bool = False) -> None:
        """Restart an engine; on return it was started, and is not ready yet. Raises NotFound, Conflict,
        Unavailable.
        """
        ...


class ValuesPort(Protocol):
    """Small values kept per account over restarts (A1111 options)."""

    async def account_get(self, account: Account, kind: str) -> bytes | None: ...

    async def account_put(self, account: Account, kind: str, value: bytes) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WebContext:
    """Everything the web is made from."""

    settings: Settings
    jobs: JobsPort
    engines: EnginesPort
    values: ValuesPort
    data_folder: Path
    new_job_id: Callable[[], JobId]
    """Random canonical UUID4."""
    processes: ProcessesPort | None = None
    """None: all engines are started by somebody else."""
    grants: Grants = field(default_factory=Grants)
    """GPUs granted to other programs."""


class Front(Protocol):
    """One service's front door."""

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        """Answer one request. `target` is origin-form (raw path and query) with any mount prefix taken
        off.
        """
        ...

    async def close(self) -> None: ...
