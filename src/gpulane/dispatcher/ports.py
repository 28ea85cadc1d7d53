"""What the parts of the dispatcher hand to each other: the attempt under way on a gpu, and what one gpu
needs of its surroundings. Data and protocols; nothing here acts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gpulane.adapters.base import EngineRequest
from gpulane.core.book import Book
from gpulane.core.breaker import BreakerLimits
from gpulane.core.events import LocalEvent
from gpulane.core.model import ClaimId, EngineUrl, GpuId, Job, JobId, NodeId, Seconds, Token
from gpulane.core.policy import Policy
from gpulane.core.watchdog import Patience
from gpulane.engine.base import AnswerSink, AttemptContext, RecordedResult, ServiceClient
from gpulane.engine.progress import ProgressHub
from gpulane.store.base import JobRecord, Store
from gpulane.store.node import GpuRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What a job sends, and where its answer goes."""

    request: EngineRequest
    meta: bytes
    answer: AnswerSink | None


class Payloads(Protocol):
    """Finds what a claimed job sends; None when it is gone (a held job of an earlier boot)."""

    async def payload(self, record: JobRecord) -> Payload | None: ...


class NodeRecords(Protocol):
    """What the node keeps for itself; `store.node.NodeStore` is the durable one."""

    async def put_gpu_record(self, *records: GpuRecord) -> None: ...

    async def drop_gpu_record(self, gpu: GpuId, token: Token) -> None: ...

    async def gpu_records(self) -> tuple[GpuRecord, ...]: ...

    def learn_put(self, kind: str, key: str, value: bytes) -> None: ...

    async def learned(self, kind: str) -> dict[str, bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLease:
    """Under which name this process holds leases."""

    node: NodeId
    boot: int
    lease_seconds: Seconds


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """The attempt under way on a gpu."""

    job: Job
    gpu: GpuId
    """As the store names it: after a restart with other names not that of the gpu it runs on."""
    token: Token
    engine: EngineUrl
    attempts: int
    context: AttemptContext | None = None
    started_at: float | None = None
    cancel_wanted: bool = False
    resuming: ClaimId | None = None
    """The claim id of a resume that was asked and not answered: it is repeated, and no GONE believed
    meanwhile."""

    def cancel(self) -> None:
        """Interrupt it, or never send it."""
        self.cancel_wanted = True
        if self.context is not None:
            self.context.cancel_wanted.set()

    def enter(self, context: AttemptContext) -> None:
        """From here on an engine client follows it."""
        self.context = context
        if self.cancel_wanted:
            context.cancel_wanted.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuParts:
    """What every gpu of this process shares."""

    lease: NodeLease
    store: Store
    records: NodeRecords
    clients: Mapping[EngineUrl, ServiceClient]
    payloads: Payloads
    hub: ProgressHub
    tell: Callable[[LocalEvent], None]
    spawn: Callable[[Coroutine[object, object, None]], None]
    book: Book
    policy: Policy
    on_result: Callable[[JobId, RecordedResult], None]
    new_claim: Callable[[], ClaimId]
    clock: Callable[[], float]
    wall: Callable[[], float]
    chance: random.Random
    patience: Patience = field(default_factory=Patience)
    """How long a job may go without progress."""
    breaker_limits: BreakerLimits = field(default_factory=BreakerLimits)
    """When a gpu is paused because attempts keep failing there."""
