"""Remembers the newest facts about jobs, for streams that a client takes up again, and wakes the streams.

Everything has a limit: the ring of facts, each stream's own queue (a reader that falls behind gets the
present state in place of what it missed), the number of streams. Listening never waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gpulane.core.events import (
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
    StoreEvent,
)
from gpulane.core.model import Failure, GpuId, Job, JobId, JobState
from gpulane.engine.progress import Progress
from gpulane.errors import Unavailable
from gpulane.web.ports import JobsPort

RING_MAX: Final = 4096
"""Facts kept for streams that are taken up again: minutes of a busy fleet."""
PENDING_MAX: Final = 1024
"""Facts that wait for one slow reader."""
STREAMS_MAX: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One change of one job."""

    n: int
    job: JobId
    state: JobState | None
    """None: unchanged."""
    what: str
    """`submitted`, `claimed`, `started` ..."""
    gpu: GpuId | None = None
    failure: Failure | None = None
    submitted: Job | None = None

    @property
    def is_end(self) -> bool:
        return self.what == "ended"


class Subscription:
    """What one stream has not yet sent."""

    def __init__(self, job: JobId | None) -> None:
        self.job = job
        """None: all jobs."""
        self.facts: deque[Fact] = deque()
        self.moved: set[JobId] = set()
        """Jobs with new progress; what it is, the hub knows."""
        self.is_behind = False
        """Facts were dropped: the present state has to be told anew."""
        self.is_closed = False
        self._wake = asyncio.Event()

    def hear(self, fact: Fact) -> None:
        """Queue a fact."""
        if self.job is not None and fact.job != self.job:
            return
        if len(self.facts) >= PENDING_MAX:
            self.facts.clear()
            self.is_behind = True
        self.facts.append(fact)
        self._wake.set()

    def hear_progress(self, job: JobId) -> None:
        """Note that a job went on."""
        if self.job is None or self.job == job:
            self.moved.add(job)
            self._wake.set()

    def nudge(self) -> None:
        """Wake the stream to look at gpus and queue."""
        self._wake.set()

    def close(self) -> None:
        """End the stream."""
        self.is_closed = True
        self._wake.set()

    async def wait(self, seconds: float) -> None:
        """Wait for news, or so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()


class Feed:
    """One per application."""

    def __init__(self, jobs: JobsPort, *, boot: str, ring_max: int = RING_MAX) -> None:
        self.boot = boot
        """Tells this process's numbers from those of another: a store in memory counts anew."""
        self.n = 0
        """Number of the newest event heard."""
        self._ring: deque[Fact] = deque(maxlen=ring_max)
        self._streams: set[Subscription] = set()
        self._stops: tuple[Callable[[], None], ...] = (
            jobs.listen(self._hear),
            jobs.hub.listen(self._hear_progress),
        )

    def subscribe(self, job: JobId | None) -> Subscription:
        """Begin a stream; `unsubscribe` ends it. Raises Unavailable when there are too many."""
        if len(self._streams) >= STREAMS_MAX:
            raise Unavailable("Too many open event streams.", code="too_many_streams")
        stream = Subscription(job)
        self._streams.add(stream)
        return stream

    def unsubscribe(self, stream: Subscription) -> None:
        """Forget a stream."""
        self._streams.discard(stream)

    def event_id(self, n: int) -> str:
        """Write an event's number as the id that a client sends back."""
        return f"{self.boot}-{n}"

    def number_of(self, event_id: str | None) -> int | None:
        """Read an id of ours back; None when it is another process's, or nothing."""
        boot, _, n = (event_id or "").rpartition("-")
        return int(n) if boot == self.boot and n.isascii() and n.isdigit() else None

    def since(self, n: int) -> tuple[Fact, ...] | None:
        """Return the facts after number n; None when some of them may be forgotten."""
        first = self._ring[0].n if len(self._ring) == self._ring.maxlen else 0
        return tuple(fact for fact in self._ring if fact.n > n) if first <= n + 1 else None

    def close(self) -> None:
        """End every stream."""
        for stop in self._stops:
            stop()
        for stream in self._streams:
            stream.close()

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        for event in events:
            self.n = max(self.n, event.n)
            fact = fact_of(event)
            if fact is not None:
                self._ring.append(fact)
            for stream in self._streams:
                if fact is None:
                    stream.nudge()
                else:
                    stream.hear(fact)

    def _hear_progress(self, progress: Progress) -> None:
        for stream in self._streams:
            stream.hear_progress(progress.job)


def fact_of(event: StoreEvent) -> Fact | None:
    """Tell what an event means for one job; None when it is about no job."""
    match event:
        case JobSubmitted():
            return Fact(
                n=event.n, job=event.job.id, state=JobState.QUEUED, what="submitted", submitted=event.job
            )
        case JobClaimed():
            return Fact(n=event.n, job=event.job, state=None, what="claimed", gpu=event.gpu)
        case JobStarted():
            return Fact(n=event.n, job=event.job, state=JobState.RUNNING, what="started")
        case JobReleased():
            return Fact(n=event.n, job=event.job, state=None, what="released")
        case AttemptFailed():
            return Fact(
                n=event.n,
                job=event.job,
                state=JobState.WAITING_RETRY,
                what="attempt_failed",
                failure=event.failure,
            )
        case JobEnded():
            return Fact(n=event.n, job=event.job, state=event.state, what="ended", failure=event.failure)
        case CancelWanted():
            return Fact(n=event.n, job=event.job, state=None, what="cancel_wanted")
        case JobPrioritised():
            return Fact(n=event.n, job=event.job, state=None, what="prioritised")
        case AttemptResumed():
            return Fact(n=event.n, job=event.job, state=None, what="resumed", gpu=event.gpu)
        case LeaseExpired():
            return Fact(n=event.n, job=event.job, state=None, what="lease_expired")
        case GpuDrained() | QueuePaused() | NodeChanged():
            return None
