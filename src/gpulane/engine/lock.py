"""The engine of every gpu that runs nothing: it grants the gpu to another program and waits for its end.

The program holds the gpu's lock file itself, so the kernel says when it and all its children have let go:
only then does `run` return, whatever became of the job, its client or its time limit. While anybody else
holds the file, the engine is not idle: a stranger's `flock NAME.lock python train.py` is seen like any
stranger's work.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol, assert_never

import msgspec
import structlog

from gpulane.core.model import (
    EngineUrl,
    Failure,
    FailureKind,
    Gpu,
    GpuId,
    JobId,
    JobState,
    Seconds,
    Service,
)
from gpulane.engine.base import (
    AnswerSink,
    AttemptContext,
    Description,
    Found,
    Outcome,
    ProbeReport,
    Vram,
)
from gpulane.engine.progress import Progress
from gpulane.errors import EngineError, GpulaneError

LOOK_SECONDS: Final = 1.0
"""How often a grant is looked at: progress, and whether its holder still has the file."""
FREE_SECONDS_FIRST: Final = 0.01
FREE_SECONDS_MAX: Final = 0.25
"""How often the file is tried after a grant is over: soon at first, most programs have ended by then."""
SECONDS_MAX_DEFAULT: Final = 3600.0
HEADERS: Final = (("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store"))

_log = structlog.stdlib.get_logger(__name__)


def lock_url(gpu: GpuId) -> EngineUrl:
    """Name the lock engine of a gpu: `lock:NODE/NAME`."""
    return EngineUrl(f"lock:{gpu}")


class LockTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a lock job asked for; its record's `meta`."""

    seconds_max: float = SECONDS_MAX_DEFAULT
    note: str = ""


class LockFile(Protocol):
    """The gpu's lock file (`dispatcher.cardlock.CardLock`)."""

    @property
    def path(self) -> Path: ...

    def held_by(self) -> str | None:
        """Tell who else than a job of ours holds it; None: nobody."""
        ...


class Over(StrEnum):
    """Why a grant ended; the event that its holder is told."""

    RELEASED = "released"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    GONE = "gone"
    """Its holder's connection broke, or the lock file was let go of without a word."""


@dataclass(slots=True, kw_only=True, eq=False)
class Grant:
    """A gpu given to a program."""

    job: JobId
    file: LockFile
    told: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the holder is done, or gone."""
    is_released: bool = False
    is_held: bool = False
    """The holder has shown that it holds the file."""


class Grants:
    """The grants of this process: where front doors tell what their holders say. One per process."""

    def __init__(self) -> None:
        self._grants: dict[JobId, Grant] = {}

    def begin(self, grant: Grant) -> None:
        """Note a grant that begins."""
        self._grants[grant.job] = grant

    def end(self, job: JobId) -> None:
        """Forget a grant that is over: from here on its holder cannot show itself any more."""
        self._grants.pop(job, None)

    def hold(self, job: JobId) -> bool | None:
        """Note that the holder has the file. False: nobody has ours, so it locked another machine's. None:
        there is no such grant (any more).
        """
        grant = self._grants.get(job)
        if grant is None or grant.told.is_set():
            return None
        grant.is_held = grant.file.held_by() is not None
        return grant.is_held

    def release(self, job: JobId) -> bool:
        """Note that the holder is done. False: no such grant."""
        grant = self._grants.get(job)
        if grant is None or grant.told.is_set():
            return False
        grant.is_released = True
        grant.told.set()
        return True

    def abandon(self, job: JobId) -> bool:
        """Note that the holder's connection is gone. False: no such grant."""
        grant = self._grants.get(job)
        if grant is not None:
            grant.told.set()
        return grant is not None


class LockClient:
    """The lock engine of one gpu, a ServiceClient. It talks to nobody: the file tells."""

    def __init__(
        self, gpu: Gpu, file: LockFile, grants: Grants, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gpu = gpu
        self._url = lock_url(gpu.id)
        self._file = file
        self._grants = grants
        self._clock = clock
        self._grant: Grant | None = None

    @property
    def url(self) -> EngineUrl:
        return self._url

    @property
    def service(self) -> Service:
        return Service.LOCK

    async def open(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to stop: the file is somebody else's to close."""

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        """Tell whether the gpu is granted, or a stranger holds its file."""
        del own, fresh
        if self._grant is not None:
            return ProbeReport(idle=False)
        held_by = self._file.held_by()
        return ProbeReport(idle=held_by is None, strange_jobs=() if held_by is None else (held_by,))

    def known_idle(self) -> bool | None:
        """The file's answer costs microseconds, and is always today's."""
        return self._grant is None and self._file.held_by() is None

    async def describe(self) -> Description:
        """It offers nothing, and refuses no job of its service for what it needs."""
        digest = hashlib.blake2b(self._url.encode(), digest_size=16).hexdigest()
        return Description(
            service=Service.LOCK, flavor="lock", version="", offers=None, documents={}, digest=digest
        )

    async def unload(self) -> None:
        """Nothing to unload: a program that has let go of the gpu has ended, or keeps nothing there."""

    async def make_loadable(self) -> None:
        """Nothing to send."""

    async def vram(self) -> Vram:
        """It cannot tell."""
        return Vram()

    async def canary(self) -> bool:
        return True

    async def find(self, job: JobId, *, fresh: bool = False) -> Found:
        """Find out who has the file. After a restart it cannot be told which job's program that is."""
        del fresh
        if self._grant is not None and self._grant.job == job:
            return Found.RUNNING
        return Found.ABSENT if self._file.held_by() is None else Found.BUSY

    async def follow(self, attempt: AttemptContext) -> Outcome:
        """Wait until the file is free: its holder's connection went with the old process."""
        await self._until_free(attempt)
        return _failed("client_gone", "its connection was lost in a restart")

    async def erase(self, job: JobId) -> None:
        """It keeps no records."""

    async def interrupt(self, job: JobId) -> None:
        """The holder is told over its connection; one that has none ends by itself, or by its user."""

    async def run(self, attempt: AttemptContext) -> Outcome:
        """Grant the gpu; return once the holder, and all that it started, have let go of the file."""
        if self._grant is not None:
            raise RuntimeError(f"{self._url} is granted to {self._grant.job}; asked for {attempt.job.id}")
        sink = attempt.answer
        if attempt.cancel_wanted.is_set():
            return Outcome(state=JobState.CANCELLED)
        if sink is None:
            return _failed("no_holder", "a lock job is held: nobody waits for this one")
        terms = _terms(attempt.meta)
        grant = self._grant = Grant(job=attempt.job.id, file=self._file)
        self._grants.begin(grant)
        began = self._clock()
        try:
            _tell(sink, self._granted(attempt.job.id, terms))
            over = await self._over(attempt, grant, terms)
            self._grants.end(grant.job)
            _log.info("lock_over", job=grant.job, gpu=self._gpu.id, how=str(over))
            _tell(sink, {"event": str(over)}, is_last=True)
            await self._until_free(attempt)
        finally:
            self._grants.end(grant.job)
            self._grant = None
        return _outcome(over, terms, self._clock() - began)

    def _granted(self, job: JobId, terms: LockTerms) -> dict[str, object]:
        return {
            "event": "granted",
            "gpu": self._gpu.id,
            "uuid": self._gpu.uuid,
            "lock_file": str(self._file.path.absolute()),
            "job": job,
            "seconds_max": terms.seconds_max,
        }

    async def _over(self, attempt: AttemptContext, grant: Grant, terms: LockTerms) -> Over:
        """1. cancelled  2. released, or its connection gone  3. its time is over  4. held no more."""
        began = self._clock()
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(grant.told.wait()), group.create_task(attempt.cancel_wanted.wait())]
            try:
                while True:
                    elapsed = self._clock() - began
                    if attempt.cancel_wanted.is_set():
                        return Over.CANCELLED
                    if grant.told.is_set():
                        return Over.RELEASED if grant.is_released else Over.GONE
                    if elapsed >= terms.seconds_max:
                        return Over.EXPIRED
                    if grant.is_held and self._file.held_by() is None:
                        return Over.GONE
                    _publish(attempt, elapsed, terms)
                    left = min(LOOK_SECONDS, terms.seconds_max - elapsed)
                    await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waits:
                    task.cancel()

    async def _until_free(self, attempt: AttemptContext) -> None:
        """Wait for the kernel's word, however long: until then the program may use the gpu."""
        rest: Seconds = FREE_SECONDS_FIRST
        shown = ""
        while (held_by := self._file.held_by()) is not None:
            if held_by != shown:
                shown = held_by
                attempt.hub.publish(Progress(job=attempt.job.id, text=f"over; still {held_by}"))
            await asyncio.sleep(rest)
            rest = min(rest * 2, FREE_SECONDS_MAX)


def _terms(meta: bytes) -> LockTerms:
    try:
        return msgspec.json.decode(meta, type=LockTerms)
    except msgspec.MsgspecError:
        return LockTerms()


def _tell(sink: AnswerSink, line: dict[str, object], *, is_last: bool = False) -> None:
    """Write one line to the holder; one that cannot be told is gone, which its connection shows."""
    try:
        if line["event"] == "granted":
            sink.begin(200, HEADERS)
        sink.write(msgspec.json.encode(line) + b"\n")
        if is_last:
            sink.finish()
    except (EngineError, GpulaneError) as error:
        _log.info("holder_not_told", told=line["event"], why=error.message)


def _publish(attempt: AttemptContext, elapsed: Seconds, terms: LockTerms) -> None:
    text = terms.note or "held by a program"
    value = min(elapsed, terms.seconds_max)
    attempt.hub.publish(Progress(job=attempt.job.id, value=value, max=terms.seconds_max, text=text))


def _outcome(over: Over, terms: LockTerms, seconds: Seconds) -> Outcome:
    match over:
        case Over.RELEASED:
            return Outcome(state=JobState.SUCCEEDED, service_seconds=seconds)
        case Over.CANCELLED:
            return Outcome(state=JobState.CANCELLED, service_seconds=seconds)
        case Over.EXPIRED:
            why = f"its time was over: it asked for {terms.seconds_max:g} s"
            return _failed("time_limit", why, seconds=seconds)
        case Over.GONE:
            return _failed("holder_gone", "its program ended without a word", seconds=seconds)
        case _:
            assert_never(over)


def _failed(code: str, message: str, *, seconds: Seconds = 0.0) -> Outcome:
    """A program's end is nobody's fault here, and nothing that another gpu would do better."""
    failure = Failure(kind=FailureKind.CLIENT, code=code, message=message)
    return Outcome(state=JobState.FAILED, failure=failure, service_seconds=seconds)
