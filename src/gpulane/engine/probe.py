"""Watches one engine: does it live, is it idle, what does it offer, does a stranger use it. Alone moves the
engine's state.

A busy gpu is slow, not dead: an engine is lost only after several misses in a row, each with seconds of
patience, and comes
back with the first answers. It never sends a job, and never touches work that it finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from gpulane.config import ProbeSettings
from gpulane.core.events import EngineLost, EngineReady, LocalEvent, ModelSeen
from gpulane.core.model import NO_MODEL, EngineState, GpuId, JobId, ModelKey
from gpulane.engine.base import Description, ProbeReport, ServiceClient, is_refused
from gpulane.errors import EngineError

STARTING_INTERVAL_SECONDS: Final = 0.5
"""How often an engine that is not ready is asked at first."""
LOST_INTERVAL_SECONDS_MAX: Final = 5.0
"""The slowest an engine that does not answer is asked."""
DESCRIBE_SECONDS_MIN: Final = 5.0
"""A description younger than this is not fetched again, however often somebody asks for what it lacks."""
STRANGER_INTERVAL_SECONDS: Final = 1.0
"""How often an engine with a stranger's work is asked whether it is over."""
REFUSALS_FOR_DEAD: Final = 3
"""Refused connections, spread over the quiet time, that prove that no process of the engine is left."""

_log = structlog.stdlib.get_logger(__name__)


class EngineWatch:
    """One engine's watch; `run` is its task."""

    def __init__(
        self,
        client: ServiceClient,
        gpu: GpuId,
        settings: ProbeSettings,
        *,
        own_jobs: Callable[[], frozenset[JobId]],
        occupancy: Callable[[], int],
        take_card: Callable[[], bool],
        give_card: Callable[[], None],
        tell: Callable[[LocalEvent], None],
        on_stranger: Callable[[bool], None],
        clock: Callable[[], float],
    ) -> None:
        """`take_card` keeps jobs off the card while a canary sings, or refuses; `give_card` ends that."""
        self.client = client
        self.gpu = gpu
        self.state = EngineState.STARTING
        self.why = "not asked yet"
        self.model: ModelKey = NO_MODEL
        self.description: Description | None = None
        self.report: ProbeReport | None = None
        self._settings = settings
        self._own_jobs = own_jobs
        self._occupancy = occupancy
        self._take_card = take_card
        self._give_card = give_card
        self._tell = tell
        self._on_stranger = on_stranger
        self._clock = clock
        self._misses = 0
        self._refused = 0
        self._refused_since = 0.0
        self._described_at = float("-inf")
        self._has_stranger = False
        self._soon = asyncio.Event()
        self._life = 0
        """Rises with each stop, start and end of the engine's process: older answers count no more."""
        self._patient_until = float("-inf")
        self.on_answer: Callable[[], None] = lambda: None
        """Told of each answered probe; whoever supervises the process listens."""

    async def run(self) -> None:
        """Probe for ever, until cancelled."""
        interval: float | None = STARTING_INTERVAL_SECONDS
        while True:
            try:
                answered = self.state is not EngineState.STOPPED and await self._opened_look()
            except Exception as error:  # noqa: BLE001  a fault in here must not end what goes on beside it
                # An answer that nobody foresaw: this engine cannot be used, and all others can.
                _log.exception("look_broke", engine=self.client.url)
                self._missed(EngineError(f"its answers are not understood: {type(error).__name__}"))
                answered = False
            if self.state is EngineState.STOPPED:
                interval = None  # until `started` says so
            elif self._has_stranger:
                interval = STRANGER_INTERVAL_SECONDS
            elif answered and self.state is EngineState.READY:
                interval = self._settings.interval_seconds
            elif answered or self._is_awaited():
                interval = STARTING_INTERVAL_SECONDS
            else:
                slower = max(interval or 0.0, STARTING_INTERVAL_SECONDS) * 1.5
                interval = min(slower, LOST_INTERVAL_SECONDS_MAX)
            try:
                async with asyncio.timeout(interval):
                    await self._soon.wait()
            except TimeoutError:
                pass
            self._soon.clear()

    def describe_soon(self) -> None:
        """Fetch anew what the engine offers, if that is older than a few seconds: a file may have been
        added.
        """
        if self._clock() - self._described_at >= DESCRIBE_SECONDS_MIN:
            self._described_at = float("-inf")
            self._soon.set()

    def look_soon(self) -> None:
        """Probe now rather than at the end of the interval."""
        self._soon.set()

    # --- what whoever supervises the engine's process says

    def stopped(self, why: str, *, comes_back: bool = False) -> None:
        """The engine is being stopped on purpose: it is not asked until `started`.

        `comes_back`: for a hand-off, which starts it again for its next job; jobs may be placed meanwhile.
        """
        self._life += 1
        if not comes_back and not (self.state is EngineState.STOPPED and self.why == why):
            self._tell(EngineLost(engine=self.client.url, why=why))
        self.state, self.why = EngineState.STOPPED, why
        self._forget_work()

    def started(self, why: str, *, patience_seconds: float) -> None:
        """A process of the engine was started: it may take so long to its first answer."""
        self._life += 1
        if self.state in {EngineState.READY, EngineState.LEAKING}:
            self._tell(EngineLost(engine=self.client.url, why=why))
        self.state, self.why = EngineState.STARTING, why
        self._patient_until = self._clock() + patience_seconds
        self._forget_work()
        self._soon.set()

    def ended(self, why: str) -> None:
        """The engine's process is known gone: that needs no misses."""
        self._life += 1
        self._patient_until = float("-inf")
        self._lose(why, "process_ended")
        self._forget_work()
        self._soon.set()

    def _is_awaited(self) -> bool:
        return self.state is EngineState.STARTING and self._clock() < self._patient_until

    def _forget_work(self) -> None:
        """What the process held and did went with it."""
        self._misses = self._refused = 0
        self.report = None
        if self.model != NO_MODEL:
            self.saw_model(NO_MODEL)
        if self._has_stranger:
            self._set_stranger(False, ())

    # --- probing

    async def _opened_look(self) -> bool:
        await self.client.open()
        return await self.look()

    async def look(self) -> bool:
        """Probe once; returns whether the engine answered."""
        life, occupancy, own = self._life, self._occupancy(), self._own_jobs()
        try:
            report = await self.client.probe(own)
            if life != self._life:
                return False
            self.on_answer()
            if self._needs_description(report):
                await self._describe(report)
        except EngineError as error:
            if life == self._life:
                self._missed(error)
            return False
        if life != self._life:
            return False
        self._misses = self._refused = 0
        self.report = report
        # A job of ours that began or ended meanwhile makes the answer say nothing about strangers.
        if self._occupancy() == occupancy:
            self._judge_strangers(report, own | self._own_jobs())
        if report.model is not None and report.model != self.model:
            self.saw_model(report.model)
        return True

    def saw_model(self, model: ModelKey) -> None:
        """Note which model the engine was proved to hold."""
        self.model = model
        self._tell(ModelSeen(gpu=self.gpu, engine=self.client.url, model=model))

    async def until_idle(self) -> bool:
        """Wait until the engine is known idle (True) or its process is known gone (False)."""
        return await until_idle(self.client, self._settings.quiet_seconds, self._clock)

    def _needs_description(self, report: ProbeReport) -> bool:
        if self.state is not EngineState.READY:
            return True
        overdue = self._clock() - self._described_at >= self._settings.describe_interval_seconds
        return overdue and report.idle

    async def _describe(self, report: ProbeReport) -> None:
        """Learn what it offers; a newly found engine must first prove that it computes."""
        fresh, life = self.state is not EngineState.READY, self._life
        if fresh and report.idle and self._take_card():
            try:
                sings = await self.client.canary()
            finally:
                self._give_card()
            if not sings and life == self._life:
                self._lose("it answers but computes nothing: its prompt thread is dead; restart it", "zombie")
                return
        description = await self.client.describe()
        if life != self._life:
            return
        self._described_at = self._clock()
        if not fresh and self.description is not None and description.digest == self.description.digest:
            return
        self.description = description
        self.state, self.why = EngineState.READY, ""
        _log.info(
            "engine_ready",
            engine=self.client.url,
            service=str(description.service),
            version=description.version,
        )
        self._tell(EngineReady(engine=self.client.url, offers=description.offers))

    def _missed(self, error: EngineError) -> None:
        self._misses += 1
        if self._is_awaited():
            return  # it was started a moment ago and reads its models
        if self.state is EngineState.STARTING or self._misses >= self._settings.misses_max:
            self._lose(error.message, error.code)
        self._refused = self._refused + 1 if is_refused(error) else 0
        now = self._clock()
        self._refused_since = now if self._refused <= 1 else self._refused_since
        is_gone = (
            self._refused >= REFUSALS_FOR_DEAD and now - self._refused_since >= self._settings.quiet_seconds
        )
        if is_gone and self._has_stranger:
            # A stranger's work went with the process; the card's other engine need not wait for its return.
            self._set_stranger(False, ())

    def _lose(self, why: str, code: str) -> None:
        if self.state is not EngineState.LOST:
            _log.warning("engine_lost", engine=self.client.url, why=why, code=code)
        if self.state is EngineState.READY or self.why != why:
            self._tell(EngineLost(engine=self.client.url, why=why))
        self.state, self.why = EngineState.LOST, why

    def _judge_strangers(self, report: ProbeReport, own: frozenset[JobId]) -> None:
        strange = bool(set(report.strange_jobs) - own) or (not report.idle and not own)
        if strange != self._has_stranger:
            self._set_stranger(strange, report.strange_jobs)

    def _set_stranger(self, seen: bool, jobs: tuple[str, ...]) -> None:
        self._has_stranger = seen
        _log.info("stranger_seen" if seen else "stranger_gone", engine=self.client.url, jobs=jobs)
        self._on_stranger(seen)


async def until_idle(client: ServiceClient, quiet_seconds: float, clock: Callable[[], float]) -> bool:
    """Wait until the engine is known idle (True) or its process is known gone (False).

    Idle: two answered probes over new connections, `quiet_seconds` apart, since an engine may still read
    the request of a
    connection that broke. Gone: refused connections over the same time. Silence proves nothing: then
    this waits on.
    """
    idle_since: float | None = None
    refused = 0
    refused_since = 0.0
    while True:
        now = clock()
        try:
            report = await client.probe(frozenset(), fresh=True)
        except EngineError as error:
            idle_since = None
            refused = refused + 1 if is_refused(error) else 0
            refused_since = now if refused <= 1 else refused_since
            if refused >= REFUSALS_FOR_DEAD and now - refused_since >= quiet_seconds:
                return False
        except Exception:  # noqa: BLE001  this must not end before the engine is known idle
            _log.exception("probe_broke", engine=client.url)
            idle_since, refused = None, 0
        else:
            refused = 0
            if not report.idle:
                idle_since = None
            elif idle_since is None:
                idle_since = now
            elif now - idle_since >= quiet_seconds:
                return True
        await asyncio.sleep(max(0.05, quiet_seconds / 4))
