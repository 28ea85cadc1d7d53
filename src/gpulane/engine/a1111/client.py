"""The ServiceClient of an A1111, Forge or SD.Next.

It must never send a job while something else runs there, repeat one whose bytes may have arrived, interrupt
what is not its own, or call the engine idle on anything but the engine's word.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import msgspec

from gpulane.adapters.a1111.catalogue import (
    DOCUMENTS,
    Catalogue,
    digest,
    find_by_stem,
    offers,
    read_catalogue,
)
from gpulane.adapters.a1111.requests import Meta
from gpulane.adapters.a1111.status import flavor_of
from gpulane.core.model import NO_MODEL, EngineUrl, JobId, JobState, ModelKey, Service
from gpulane.engine.a1111.attempt import Attempt
from gpulane.engine.a1111.looks import Looks, Task
from gpulane.engine.a1111.pace import Pace
from gpulane.engine.a1111.pins import Pins
from gpulane.engine.a1111.unloading import Unloading
from gpulane.engine.base import BUSY, AttemptContext, Description, Found, Outcome, ProbeReport, Vram
from gpulane.engine.control import ControlCalls, StatusError, named
from gpulane.errors import EngineError
from gpulane.wire import EngineClient

JOB_CONNECTIONS_MAX: Final = 4
"""One job at a time; the rest is room for connections that are being closed."""
DESCRIBE_AT_ONCE: Final = 4
"""The engine answers everything with the same forty threads."""


class A1111Client:
    """One engine."""

    def __init__(
        self,
        url: EngineUrl,
        wire: EngineClient | None = None,
        *,
        timeout_seconds: float = 10.0,
        acknowledge_seconds: float = 15.0,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wire`: the connections that jobs go over, by default their own: relayed pages must not hold
        them up.
        """
        self._url = url
        self._own_wire = wire is None
        self._wire = wire or EngineClient(url, connections_max=JOB_CONNECTIONS_MAX)
        self._calls = ControlCalls(url, timeout_seconds=timeout_seconds)
        self._looks = Looks(self._calls, clock)
        self._pins = Pins(self._calls)
        self._unloading = Unloading(self._calls, acknowledge_seconds=acknowledge_seconds)
        self._pace = pace or Pace()
        self._clock = clock
        self._catalogue = Catalogue()
        self._version = ""
        self._loaded: ModelKey = NO_MODEL
        self._running: JobId | None = None

    @property
    def url(self) -> EngineUrl:
        return self._url

    @property
    def service(self) -> Service:
        return Service.A1111

    async def open(self) -> None:
        """Nothing to start: this engine tells only when asked."""

    async def close(self) -> None:
        """Close its connections."""
        await self._calls.close()
        if self._own_wire:
            await self._wire.close()

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        """Ask whether it lives and is idle."""
        report = await self._looks.probe(own, fresh=fresh)
        # Its state still says idle while it reads the body of a job.
        return replace(report, idle=False) if self._running is not None else report

    def known_idle(self) -> bool | None:
        """Busy while our own job runs; else it has to be asked."""
        return None if self._running is None else False

    async def describe(self) -> Description:
        """Fetch the lists of what it offers. Raises EngineError."""
        self._looks.forget()
        documents = await self._documents()
        if "sd-models" not in documents:
            message = f"{self._url} has no /sdapi: start the webui with --api"
            raise EngineError(message)
        self._catalogue = read_catalogue(documents)
        flavor = flavor_of(documents)
        self._unloading.described(flavor)
        return Description(
            service=Service.A1111,
            flavor=flavor,
            version=self._version,
            offers=offers(self._catalogue),
            documents=documents,
            digest=digest(documents),
        )

    async def unload(self) -> None:
        """Have the checkpoint taken off the card; it stays in RAM, so a next job needs less than a load."""
        await self._must_be_idle()
        await self._unloading.unload()
        self._looks.forget_memory()

    async def make_loadable(self) -> None:
        """Have the checkpoint put back on the card, where an unload of ours took it off."""
        if await self._unloading.needs_reload():
            await self._must_be_idle()
            await self._unloading.make_loadable()

    async def vram(self) -> Vram:
        """Measure the card."""
        return await self._unloading.vram()

    async def _must_be_idle(self) -> None:
        report = await self.probe(frozenset(), fresh=True)
        if not report.idle:
            raise named(EngineError(f"{self._url} is at work: it is not unloaded now", sent=False), BUSY)

    async def canary(self) -> bool:
        """No proof short of rendering a picture exists."""
        return True

    async def run(self, attempt: AttemptContext) -> Outcome:
        """Send the job and wait for its answer."""
        if self._running is not None:
            raise RuntimeError(f"{self._url} already runs {self._running}; asked for {attempt.job.id}")
        self._running = attempt.job.id
        try:
            if not attempt.cancel_wanted.is_set():
                await self._pins.pin(msgspec.json.decode(attempt.meta, type=Meta).overrides)
            outcome = await self._attempt(attempt).run()
            if outcome.state is JobState.FAILED:
                self._unloading.doubted()
            return outcome
        finally:
            self._running = None

    async def follow(self, attempt: AttemptContext) -> Outcome:
        """Wait until a job of an earlier connection is over; its answer went with that connection."""
        self._running = attempt.job.id
        try:
            return await self._attempt(attempt).follow()
        finally:
            self._running = None

    async def find(self, job: JobId, *, fresh: bool = True) -> Found:
        """Look for a job. What has ended is ABSENT: its answer cannot be fetched again."""
        del fresh  # a look always is
        seen = await self._looks.look(job)
        if seen.is_idle:
            return Found.ABSENT
        match seen.task:
            case Task.ACTIVE:
                return Found.RUNNING
            case Task.QUEUED:
                return Found.WAITING
            case Task.UNTOLD:
                return Found.BUSY
            case Task.COMPLETED | Task.UNKNOWN:
                return Found.ABSENT

    async def erase(self, job: JobId) -> None:
        """Nothing of an ended job can be fetched again here, so there is nothing to remove."""

    async def interrupt(self, job: JobId) -> None:
        """Interrupt the job if the engine says that it is the running one; nothing else is ever
        interrupted.
        """
        seen = await self._looks.look(job)
        if seen.task is Task.ACTIVE and not seen.is_idle:
            await self._looks.interrupt()

    def _attempt(self, context: AttemptContext) -> Attempt:
        return Attempt(
            context,
            wire=self._wire,
            looks=self._looks,
            headers=tuple(self._calls.headers),
            pace=self._pace,
            clock=self._clock,
            loaded=self._loaded,
            on_proof=self._proved,
            engine=self._url,
        )

    def _proved(self, name: str, version: str, asked: ModelKey) -> ModelKey:
        """Learn from an answer what is loaded now; returns it as the key jobs would ask for."""
        self._unloading.proved()
        self._version = version or self._version
        if asked:
            self._loaded = asked
        else:
            known = find_by_stem(self._catalogue.checkpoints, name)
            self._loaded = ModelKey(known.name) if known is not None else NO_MODEL
        return self._loaded

    async def _documents(self) -> dict[str, bytes]:
        documents: dict[str, bytes] = {}
        limit = asyncio.Semaphore(DESCRIBE_AT_ONCE)

        async def fetch(name: str, target: str) -> None:
            async with limit:
                status, body = await self._calls.fetch("GET", target)
            if status == 200:
                documents[name] = body
            elif status in {401, 403}:
                message = (
                    f"{self._url} wants a login (--api-auth): write it as http://USER:PASSWORD@HOST:PORT"
                )
                raise StatusError(message, status=status)

        try:
            async with asyncio.TaskGroup() as group:
                for name, target in DOCUMENTS.items():
                    group.create_task(fetch(name, target))
        except* EngineError as errors:
            raise _first(errors) from None
        return documents


def _first(errors: BaseExceptionGroup[EngineError]) -> EngineError:
    first = errors.exceptions[0]
    return first if isinstance(first, EngineError) else _first(first)
