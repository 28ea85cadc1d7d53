"""Gives a card from one engine to another: commanded, then measured, before a job's first byte.

What must go is decided by `core.handoff`; this carries it out. Nothing here counts as a start: a cancel, or
an engine that will not let go, costs the job nothing but its turn. An unload that is acknowledged proves
nothing, so memory is measured: by the driver where there is one, else by the engines' own word.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from gpulane.config.settings import HandoffSettings
from gpulane.core.book import Book
from gpulane.core.events import (
    CardMeasured,
    EngineLeaking,
    EngineUnloaded,
    HandoffMeasured,
    LocalEvent,
    VramMeasured,
)
from gpulane.core.handoff import HandoffPlan, enough
from gpulane.core.model import NO_MODEL, EngineUrl, Gpu, Job, JobId, Seconds, Service
from gpulane.engine.base import BUSY, ServiceClient, is_refused
from gpulane.engine.control import StatusError
from gpulane.engine.telemetry import Telemetry
from gpulane.errors import EngineError, GpulaneError

CONTEXT_BYTES: Final = 700 * 1024**2
"""What a process with a CUDA context holds without any model: some hundred MB (automatic1111.md 2)."""
POLL_SECONDS: Final = 0.025
"""How often memory is measured at first, while it is expected to come free: the job waits for it."""
POLL_OFTEN_SECONDS: Final = 3.0
POLL_SECONDS_LATER: Final = 0.5
REFUSED: Final = "engine_refused"
"""Code of an engine's own answer that it cannot; silence has other codes."""
TRIES: Final = 2
"""Unloads per hand-off: a second one helps where the first came in the middle of something."""
UNANSWERED_SECONDS: Final = 60.0
"""How long an unload that was sent and not acknowledged may still be carried out by its engine."""
PEAK_SECONDS: Final = 1.0
"""How long a measure at the end of a job may take: the next one waits for it."""

_log = structlog.stdlib.get_logger(__name__)


class Restarts(Protocol):
    """What can stop, start and restart engines (`dispatcher.supervision`)."""

    def can_restart(self, url: EngineUrl) -> bool: ...

    async def restart(self, url: EngineUrl, why: str, *, force: bool = False) -> None: ...

    async def stop_for_handoff(self, url: EngineUrl) -> None: ...

    async def start_again(self, url: EngineUrl) -> bool:
        """Start an engine that was stopped for a hand-off; returns whether it is there again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffParts:
    """What all cards of this process share."""

    book: Book
    clients: Mapping[EngineUrl, ServiceClient]
    settings: HandoffSettings
    telemetry: Telemetry
    restarts: Restarts
    stoppable: frozenset[EngineUrl]
    """Engines that may be stopped where unloading is not enough (`stop_to_unload`)."""
    tell: Callable[[LocalEvent], None]
    clock: Callable[[], float]


class _NotNow(Exception):
    """The hand-off ends here, for a reason that says nothing about memory."""


class Handoff:
    """Clears one card for its next job."""

    def __init__(self, gpu: Gpu, parts: HandoffParts) -> None:
        self._gpu = gpu
        self._parts = parts
        self._leaking: set[EngineUrl] = set()
        self._bytes_total: int | None = None
        self._cold: tuple[JobId, int] | None = None
        """The job that began on an engine known to hold nothing, and what was free then."""
        self._unanswered: dict[EngineUrl, Seconds] = {}
        """Engines that may still act on an unload, and since when."""
        self._leaked: HandoffPlan | None = None
        """What did not come free; None: all did."""
        self._is_wanted: Callable[[], bool] = lambda: True

    async def clear(
        self,
        job: Job,
        engine: EngineUrl,
        *,
        unload_all: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> str | None:
        """Make room for the job; returns None when it may start, or why it may not.

        1. Nothing has to go: start.
        2. Unload, measure; once more when memory did not come free.
        3. It came free: start.
        4. It did not: the engines leak. Stop those that may be stopped, else as `when_leaking` says.

        Ends early, between two steps, once the job is not wanted any more.
        """
        try:
            return await self._clear(job, engine, unload_all=unload_all, is_wanted=is_wanted)
        except _NotNow as why:
            return str(why)

    async def _clear(
        self, job: Job, engine: EngineUrl, *, unload_all: bool, is_wanted: Callable[[], bool]
    ) -> str | None:
        parts, gpu = self._parts, self._gpu
        if job.service is Service.LOCK and not self._others(engine):
            return None
        self._cold, self._is_wanted = None, is_wanted
        await self._await_silence(engine)
        if self._is_alone(engine):
            # Nobody has to make room for it, so nothing is measured: the engine waits for its next job.
            return await self._comes_back(engine) or await self._loads_again(engine)
        bytes_free = await self.bytes_free(engine)
        self._see_empty(bytes_free)
        plan = parts.book.handoff_plan(
            gpu.id, engine, job.model, bytes_free=bytes_free, unload_all=unload_all
        )
        if not plan.unload and not plan.make_loadable:  # 1
            self._note_cold(job, engine, bytes_free)
            return await self._comes_back(engine) or await self._loads_again(engine)
        began = parts.clock()
        unloaded = plan.unload
        if plan.unload and not await self._unload(plan):  # 2
            refused = await self._leaks(plan)  # 4
            if refused is not None:
                return refused
            unloaded = tuple(url for url in plan.unload if url not in self._leaking)
        gone = await self._comes_back(engine)
        if gone is not None:
            return gone
        # Before anything is loaded again: what the job needs is the difference.
        self._note_cold(job, engine, await self.bytes_free(engine))
        stays_off = await self._loads_again(engine)
        if stays_off is not None:
            return stays_off
        seconds = parts.clock() - began
        if plan.unload:
            parts.tell(HandoffMeasured(gpu=gpu.id, seconds=seconds, unloaded=unloaded))
        _log.info(
            "handed_over",
            gpu=gpu.id,
            to=engine,
            unloaded=list(plan.unload),
            seconds=round(seconds, 3),
            why=plan.why,
        )
        return None

    async def _comes_back(self, engine: EngineUrl) -> str | None:
        """Start the target again if it was stopped to make room for another."""
        if engine not in self._parts.stoppable or await self._parts.restarts.start_again(engine):
            return None
        return f"{engine} was stopped for another engine and does not come back"

    async def _loads_again(self, engine: EngineUrl) -> str | None:
        """What was unloaded may need an order first. Asked before every job: an unload may have been carried
        out that was never acknowledged, or sent by an earlier life of ours; the client knows when there is
        nothing to send.
        """
        try:
            await self._parts.clients[engine].make_loadable()
        except EngineError as error:
            if error.code == REFUSED:
                return (
                    None  # it has no memory for it: the job says so and counts, else it would wait for ever
                )
            return f"{engine} cannot load again: {error.message}"
        return None

    async def learn_peak(self, job: Job, engine: EngineUrl) -> None:
        """Note what a job needed that began on an engine that held nothing, by what is free after it.

        Engines keep what they allocated until they are told to give it back, so the end shows the peak. Worth
        one short look and no fault: the end of the job waits for it.
        """
        try:
            async with asyncio.timeout(PEAK_SECONDS):
                await self._learn_peak(job, engine)
        except TimeoutError:
            pass
        except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("not_learned", job=job.id)

    async def _learn_peak(self, job: Job, engine: EngineUrl) -> None:
        cold, self._cold = self._cold, None
        if cold is None or cold[0] != job.id or job.model == NO_MODEL:
            return
        bytes_free = await self.bytes_free(engine)
        if bytes_free is not None and cold[1] > bytes_free:
            peak = cold[1] - bytes_free
            measured = VramMeasured(gpu=self._gpu.id, service=job.service, model=job.model, bytes_peak=peak)
            self._parts.tell(measured)

    async def restart_hung(self, engine: EngineUrl) -> None:
        """Restart an engine that hangs, where the settings say how."""
        restarts = self._parts.restarts
        if not restarts.can_restart(engine):
            _log.warning("engine_hangs", engine=engine, hint="no `command` or `restart` in its settings")
            return
        try:
            await restarts.restart(engine, "a job hung in it and could not be interrupted", force=True)
        except GpulaneError as error:
            _log.error("restart_failed", engine=engine, why=error.message)

    async def unload_idle(self) -> None:
        """Have every engine of the card give its memory back; the caller holds the card."""
        for engine in self._gpu.engines:
            if engine.service is Service.LOCK or self._is_empty(engine.url):
                continue
            with contextlib.suppress(_NotNow):  # somebody's work came in between: it is not idle
                if await self._command(engine.url):
                    self._parts.tell(EngineUnloaded(gpu=self._gpu.id, engine=engine.url))

    async def look_at_leaks(self) -> None:
        """Try once more what did not come free; the caller holds the card. Where leaking engines keep their
        card from all jobs, nothing else would ever find out that they have let go.
        """
        plan, self._is_wanted = self._leaked, lambda: True
        if plan is not None:
            with contextlib.suppress(_NotNow):
                await self._unload(plan, tries=1)

    @property
    def is_leaking(self) -> bool:
        return bool(self._leaking)

    async def bytes_free(self, engine: EngineUrl) -> int | None:
        """Measure the card: the driver's word, else the engine's, else any other engine's. None: unknown."""
        reading = await self._parts.telemetry.read(self._gpu.uuid)
        if reading is not None and reading.bytes_free is not None:
            self._see_total(reading.bytes_total)
            return reading.bytes_free
        urls = (engine, *(e.url for e in self._gpu.engines if e.url != engine))
        for url in urls:
            try:
                found = await self._parts.clients[url].vram()
            except EngineError:
                continue
            if found.bytes_free is not None:
                self._see_total(found.bytes_total)
                return found.bytes_free
        return None

    # --- what memory tells of engines

    def _see_total(self, bytes_total: int | None) -> None:
        if bytes_total and bytes_total != self._bytes_total:
            self._bytes_total = bytes_total
            self._parts.tell(CardMeasured(gpu=self._gpu.id, bytes_total=bytes_total))

    def _see_empty(self, bytes_free: int | None) -> None:
        """A card with next to nothing in it holds no model, whatever was loaded before we came."""
        total = self._bytes_total
        if bytes_free is None or total is None:
            return
        contexts = CONTEXT_BYTES * len(self._gpu.engines)
        if bytes_free + contexts < total:
            return
        for engine in self._gpu.engines:
            if engine.service is not Service.LOCK and not self._is_empty(engine.url):
                self._parts.tell(EngineUnloaded(gpu=self._gpu.id, engine=engine.url))

    def _is_empty(self, engine: EngineUrl) -> bool:
        return not self._parts.book.gpus[self._gpu.id].engines[engine].may_hold

    def _note_cold(self, job: Job, engine: EngineUrl, bytes_free: int | None) -> None:
        if bytes_free is not None and self._is_empty(engine):
            self._cold = (job.id, bytes_free)

    # --- unloading

    async def _await_silence(self, engine: EngineUrl) -> None:
        """See that no earlier unload meets the job: one that was sent and not acknowledged, unless a later
        one was, or it is too old to come.
        """
        sent_at = self._unanswered.get(engine)
        if sent_at is None:
            return
        if self._parts.clock() - sent_at < UNANSWERED_SECONDS and not await self._command(engine):
            raise _NotNow(f"{engine} has not acknowledged an unload, and may still act on it")
        self._unanswered.pop(engine, None)

    async def _unload(self, plan: HandoffPlan, *, tries: int = TRIES) -> bool:
        """Command and measure, twice at most; returns whether enough came free."""
        for number in range(tries):
            answers = [await self._command(url) for url in plan.unload]
            if await self._comes_free(plan, all_acknowledged=all(answers)):
                for url in plan.unload:
                    self._parts.tell(EngineUnloaded(gpu=self._gpu.id, engine=url))
                    self._is_leaking(url, leaking=False, why="")
                self._leaked = None
                return True
            _log.warning("memory_not_free", gpu=self._gpu.id, engines=list(plan.unload), tries=number + 1)
        return False

    async def _command(self, url: EngineUrl) -> bool:
        """Tell one engine to unload; returns whether it acknowledged. Silence has a limit.

        Raises _NotNow for an engine at work: neither is it stopped for that, nor does a job begin beside it.
        """
        self._must_be_wanted()
        self._unanswered.setdefault(url, self._parts.clock())
        try:
            async with asyncio.timeout(self._parts.settings.acknowledge_seconds):
                await self._parts.clients[url].unload()
        except TimeoutError:
            _log.warning("unload_not_acknowledged", engine=url)
            return False
        except EngineError as error:
            if not error.sent or isinstance(error, StatusError) or error.code == "command_failed":
                self._unanswered.pop(url, None)  # nothing of it is under way
            if error.code == BUSY:
                raise _NotNow(error.message) from error
            _log.warning("unload_failed", engine=url, why=error.message, code=error.code)
            return is_refused(error)  # no process, no memory
        self._unanswered.pop(url, None)
        return True

    def _must_be_wanted(self) -> None:
        if not self._is_wanted():
            raise _NotNow("it is not wanted any more")

    async def _comes_free(self, plan: HandoffPlan, *, all_acknowledged: bool) -> bool:
        """Measure until enough is free. What cannot be measured is believed when all have acknowledged."""
        parts = self._parts
        began = parts.clock()
        ends = began + parts.settings.unload_seconds
        while True:
            self._must_be_wanted()
            bytes_free = await self.bytes_free(plan.unload[0])
            if bytes_free is None or plan.wanted_bytes_free is None:
                return all_acknowledged
            if enough(bytes_free, plan):
                return True
            now = parts.clock()
            pause = POLL_SECONDS if now - began < POLL_OFTEN_SECONDS else POLL_SECONDS_LATER
            if now + pause >= ends:
                return False
            await asyncio.sleep(pause)

    # --- when memory does not come free

    async def _leaks(self, plan: HandoffPlan) -> str | None:
        """Stop what may be stopped; else report the engines, and do as the settings say."""
        parts = self._parts
        stopped = [url for url in plan.unload if url in parts.stoppable]
        for url in stopped:
            await parts.restarts.stop_for_handoff(url)
            self._unanswered.pop(url, None)
        if stopped and await self._comes_free(plan, all_acknowledged=True):
            return None
        self._leaked = plan
        why = "its memory did not come free after two unloads"
        for url in plan.unload:
            self._is_leaking(url, leaking=True, why=why)
        match parts.settings.when_leaking:
            case "run":
                return None
            case "skip":
                return f"{', '.join(plan.unload)}: {why}"
            case "restart":
                return await self._restart(plan)

    async def _restart(self, plan: HandoffPlan) -> str | None:
        restartable = [url for url in plan.unload if self._parts.restarts.can_restart(url)]
        for url in restartable:
            try:
                await self._parts.restarts.restart(url, "it leaks memory", force=True)
            except GpulaneError as error:
                return f"{url} leaks memory and cannot be restarted: {error.message}"
        if restartable and await self._comes_free(plan, all_acknowledged=True):
            for url in plan.unload:
                self._is_leaking(url, leaking=False, why="")
            self._leaked = None
            return None
        return f"{', '.join(plan.unload)}: memory did not come free, after a restart either"

    def _is_leaking(self, url: EngineUrl, *, leaking: bool, why: str) -> None:
        was_leaking = url in self._leaking
        if not leaking and not was_leaking:
            return
        (self._leaking.add if leaking else self._leaking.discard)(url)
        # Told again each time: an engine that became ready anew counts as sound until somebody says so.
        self._parts.tell(EngineLeaking(engine=url, leaking=leaking, why=why))
        if leaking and not was_leaking:
            _log.warning("engine_leaking", engine=url, why=why)

    def _is_alone(self, engine: EngineUrl) -> bool:
        return [e.url for e in self._gpu.engines if e.service is not Service.LOCK] == [engine]

    def _others(self, engine: EngineUrl) -> bool:
        return any(e.url != engine for e in self._gpu.engines)
