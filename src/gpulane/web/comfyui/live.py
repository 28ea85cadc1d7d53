"""The ComfyUI jobs that have not ended, as far as sockets and counts need them: kept up by the store's
events.

An account's jobs from before our start are read once, when it first asks; no scan of the whole store is
ever made.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from gpulane.core.model import Account, Job, JobId
from gpulane.store.base import JobRecord
from gpulane.web.comfyui.own import OwnJobs, is_running, meta_of, shown_id

STRAYS_MAX: Final = 1_000
"""Running jobs of accounts that never asked; far above any number of gpus."""
HELD_MAX: Final = 8
"""Messages held until a job's end is recorded: the end itself and the end of the run."""


@dataclass(slots=True)
class Replay:
    """What a client that reconnects in the middle of a run is told."""

    start: bytes | None = None
    executing: bytes | None = None
    progress_state: bytes | None = None
    progress: bytes | None = None

    def note(self, kind: str, message: bytes) -> None:
        """Remember the newest message of the kinds that make up the state."""
        match kind:
            case "execution_start":
                self.start = message
            case "executing":
                self.executing = message
            case "progress_state":
                self.progress_state = message
            case "progress":
                self.progress = message
            case _:
                pass

    def messages(self) -> tuple[bytes, ...]:
        """Return what to tell, in order; ComfyUI itself tells `executing` alone."""
        return tuple(m for m in (self.executing, self.progress_state, self.progress) if m is not None)


@dataclass(slots=True, kw_only=True)
class LiveJob:
    """One job on its way."""

    job: JobId
    account: Account
    client_id: str | None
    shown_id: str
    is_stored: bool = False
    has_run: bool = False
    replay: Replay = field(default_factory=Replay)
    held: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    """Kind and text of the messages that wait for the end to be recorded."""

    def hold(self, kind: str, message: bytes) -> None:
        self.held.append((kind, message))
        del self.held[:-HELD_MAX]

    def begin_again(self) -> None:
        """Forget the attempt that failed."""
        self.held.clear()
        self.replay = Replay()


class LiveJobs:
    """All of them that this process has met."""

    def __init__(self, own: OwnJobs) -> None:
        self._own = own
        self._jobs: dict[JobId, LiveJob] = {}
        self._running: set[JobId] = set()
        """Those that an engine has begun: a few, among many that wait."""
        self._counts: Counter[Account] = Counter()
        self._loaded: set[Account] = set()
        self._loading: dict[Account, set[JobId]] = {}
        """Jobs that ended while their account was being read."""
        self._strays: dict[JobId, Replay] = {}
        self._lock = asyncio.Lock()

    def get(self, job: JobId) -> LiveJob | None:
        return self._jobs.get(job)

    def remaining(self, account: Account) -> int:
        """Count what waits or runs. Right only after `load`."""
        return self._counts[account]

    def running_of(self, account: Account, client_id: str) -> list[LiveJob]:
        """List the jobs of one client id that an engine has begun."""
        running = (self._jobs.get(job) for job in self._running)
        return [
            live
            for live in running
            if live is not None and (live.account, live.client_id) == (account, client_id)
        ]

    def note(self, job: JobId, kind: str, message: bytes) -> None:
        """Keep the newest message of a running job, known or not."""
        live = self._jobs.get(job)
        if live is None:
            while len(self._strays) >= STRAYS_MAX:
                del self._strays[next(iter(self._strays))]
            self._strays.setdefault(job, Replay()).note(kind, message)
            return
        live.replay.note(kind, message)
        live.has_run = True
        self._running.add(job)

    def fell_back(self, job: JobId) -> None:
        """Forget an attempt that failed: the job waits again."""
        live = self._jobs.get(job)
        self._running.discard(job)
        if live is not None:
            live.begin_again()

    # --- what becomes of a job

    def expect(self, job: Job, client_id: str | None, shown: str) -> None:
        """Know whose a job is before it is stored: its first events may come before the store's reply."""
        self._jobs[job.id] = LiveJob(job=job.id, account=job.account, client_id=client_id, shown_id=shown)

    def withdraw(self, job: JobId) -> None:
        """It was refused, or is the same as one that is there."""
        live = self._jobs.get(job)
        if live is not None and not live.is_stored:
            del self._jobs[job]

    def stored(self, job: Job) -> bool:
        """Count a submitted job. False: it came another way, and its client is not known yet."""
        live = self._jobs.get(job.id)
        is_expected = live is not None
        if live is None:
            live = LiveJob(job=job.id, account=job.account, client_id=None, shown_id=job.id)
            self._jobs[job.id] = live
        if not live.is_stored:
            live.is_stored = True
            self._counts[job.account] += 1
        return is_expected

    def ended(self, job: JobId) -> LiveJob | None:
        """Forget a job; None when it was never met."""
        self._strays.pop(job, None)
        self._running.discard(job)
        for ended in self._loading.values():
            ended.add(job)
        live = self._jobs.pop(job, None)
        if live is not None and live.is_stored:
            self._counts[live.account] -= 1
            if self._counts[live.account] <= 0:
                del self._counts[live.account]
        return live

    def adopt(self, record: JobRecord) -> None:
        """Learn a job from its record."""
        live = self._jobs.get(record.job.id)
        if live is None:
            self.stored(record.job)
            live = self._jobs[record.job.id]
            live.replay = self._strays.pop(record.job.id, live.replay)
        if live.replay.executing is not None:
            self._running.add(live.job)
        live.client_id = meta_of(record).client_id
        live.shown_id = shown_id(record)
        live.has_run = live.has_run or is_running(record)

    async def load(self, account: Account) -> None:
        """Read an account's jobs from before our start, once."""
        if account in self._loaded:
            return
        async with self._lock:
            if account in self._loaded:
                return
            ended = self._loading.setdefault(account, set())
            try:
                for record in await self._own.unended(account):
                    if record.job.id not in ended:
                        self.adopt(record)
            finally:
                del self._loading[account]
            self._loaded.add(account)
