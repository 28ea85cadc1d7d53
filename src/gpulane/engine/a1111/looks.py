"""Looks at an engine: what runs, whose it is, whether it is idle. Works without /internal too (--nowebui).

It must never take a stale entry of the task tables for work, nor decode previews more often than needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gpulane.adapters.a1111.status import (
    INTERRUPT,
    MEMORY,
    PENDING_TASKS,
    PROGRESS,
    TASK_PROGRESS,
    GlobalProgress,
    Memory,
    PendingTasks,
    TaskProgress,
    task_question,
)
from gpulane.core.model import JobId
from gpulane.engine.base import ProbeReport
from gpulane.engine.control import ControlCalls, StatusError
from gpulane.errors import EngineError

STALE_SECONDS: Final = 1.5
"""A task that still waits in an idle engine after this never started: the engine forgot to remove it. A
real one starts within milliseconds."""
STALE_MAX: Final = 1_000
MEMORY_INTERVAL_SECONDS: Final = 30.0


class Task(StrEnum):
    """What the engine says of one task."""

    ACTIVE = "active"
    QUEUED = "queued"
    COMPLETED = "completed"
    UNKNOWN = "unknown"
    UNTOLD = "untold"
    """It keeps no table (--nowebui)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the engine."""

    is_idle: bool
    task: Task
    state: GlobalProgress


class Looks:
    """The questions that one engine is asked."""

    def __init__(self, calls: ControlCalls, clock: Callable[[], float]) -> None:
        self._calls = calls
        self._clock = clock
        self._has_tables: bool | None = None
        """None: not known yet. Found out again after a restart, since one may be with and the next
        without."""
        self._pending_since: dict[str, float] = {}
        self._memory: tuple[int, int] | None = None
        self._memory_at = float("-inf")

    async def probe(self, own: frozenset[JobId], *, fresh: bool) -> ProbeReport:
        """Tell whether anything is in the engine, and what of it is not ours."""
        pending = await self._pending(fresh=fresh)
        for job in own:
            task = await self.task(job)
            if task is not None and task.active:
                return ProbeReport(idle=False, strange_jobs=self._strange(pending, own, is_idle=False))
        state = (await self.state(fresh=fresh)).state
        strange = self._strange(pending, own, is_idle=state.is_idle)
        is_idle = state.is_idle and not strange
        free, total = await self._card() if is_idle else (None, None)
        return ProbeReport(idle=is_idle, strange_jobs=strange, vram_bytes_free=free, vram_bytes_total=total)

    async def look(self, job: JobId) -> Look:
        """Look at the engine and at one job, over new connections: what they say is of this moment."""
        task = await self.task(job, fresh=True)
        state = await self.state(fresh=True)
        # An active task in an idle engine has failed there; one waiting in an idle engine is looked at again.
        is_idle = state.state.is_idle and not (task is not None and task.queued and self._waits(job))
        return Look(is_idle=is_idle, task=_word(task), state=state)

    async def state(self, *, fresh: bool = False) -> GlobalProgress:
        """Ask for the state of whatever runs."""
        return await self._calls.ask(GlobalProgress, PROGRESS, fresh=fresh)

    @property
    def has_tables(self) -> bool | None:
        """Whether the engine has /internal; None: not known yet."""
        return self._has_tables

    async def task(
        self, job: JobId, *, fresh: bool = False, preview: bool = False, shown: int = -1
    ) -> TaskProgress | None:
        """Ask for one task; None: the engine keeps no table."""
        if self._has_tables is False:
            return None
        question = task_question(job, preview=preview, shown=shown)
        try:
            found = await self._calls.ask(TaskProgress, TASK_PROGRESS, question, fresh=fresh)
        except StatusError as error:
            if error.status not in {404, 405}:
                raise
            self._has_tables = False
            return None
        self._has_tables = True
        return found

    async def interrupt(self) -> None:
        """Interrupt whatever runs: the caller has made sure that it is the right one."""
        await self._calls.fetch("POST", INTERRUPT, fresh=True)

    def forget(self) -> None:
        """The engine restarted: nothing that was learned of it counts any more."""
        self._has_tables = None
        self._pending_since.clear()

    def forget_memory(self) -> None:
        """The card is measured again at the next probe."""
        self._memory_at = float("-inf")

    async def _pending(self, *, fresh: bool) -> tuple[str, ...]:
        try:
            found = await self._calls.ask(PendingTasks, PENDING_TASKS, fresh=fresh)
        except StatusError as error:
            if error.status not in {404, 405}:
                raise
            self._has_tables = False
            return ()
        self._has_tables = True
        return tuple(found.tasks)

    def _strange(self, pending: tuple[str, ...], own: frozenset[JobId], *, is_idle: bool) -> tuple[str, ...]:
        # How long each has waited is noted for our own tasks too: `look` goes by it, between any two probes.
        return tuple(t for t in self._not_stale(pending, is_idle=is_idle) if t not in own)

    def _not_stale(self, pending: tuple[str, ...], *, is_idle: bool) -> tuple[str, ...]:
        """Leave out what has been waiting in an idle engine; only idle time counts."""
        now = self._clock()
        if not is_idle:
            known = {t: since for t, since in self._pending_since.items() if now - since >= STALE_SECONDS}
            self._pending_since = known
            return tuple(t for t in pending if t not in known)
        since = {task: self._pending_since.get(task, now) for task in pending[:STALE_MAX]}
        self._pending_since = since
        return tuple(t for t, at in since.items() if now - at < STALE_SECONDS)

    def _waits(self, job: JobId) -> bool:
        now = self._clock()
        return now - self._pending_since.setdefault(job, now) < STALE_SECONDS

    async def _card(self) -> tuple[int | None, int | None]:
        """Measure the card now and then; an engine without a gpu, or without an answer, tells nothing."""
        now = self._clock()
        if now - self._memory_at >= MEMORY_INTERVAL_SECONDS:
            self._memory_at = now
            try:
                self._memory = (await self._calls.ask(Memory, MEMORY)).card()
            except EngineError:
                self._memory = None
        return self._memory or (None, None)


def _word(task: TaskProgress | None) -> Task:
    if task is None:
        return Task.UNTOLD
    if task.active:
        return Task.ACTIVE
    # A re-used id shows as completed while it waits: waiting is the newer word.
    if task.queued:
        return Task.QUEUED
    return Task.COMPLETED if task.completed else Task.UNKNOWN
