"""Watches one attempt in one ComfyUI until it is over: events as they come, and looks at queue and history
beside them.

It never ends because of a client, a timer of the job or a broken socket: only by the engine's word, or when
the engine has been gone, silent or dead inside for long (`Ending`); then its gpu is not known to be idle.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum

from gpulane.adapters.comfyui.messages import Evidence, Look, Message, Place, QueueView
from gpulane.adapters.comfyui.rewrite import preview_of, text_of
from gpulane.engine.base import AttemptContext, is_refused
from gpulane.engine.comfyui.api import EngineApi
from gpulane.engine.comfyui.events import EventSocket
from gpulane.engine.comfyui.orders import interrupt
from gpulane.engine.comfyui.timings import Timings
from gpulane.engine.progress import Progress
from gpulane.errors import EngineError

ENTRY_RETRIES_SECONDS = (0.0, 0.003, 0.01, 0.03, 0.1)
"""The entry in the history is there with the last message; once in 200 runs it was some milliseconds late."""
MISSES_MIN = 3
"""Looks that must fail in a row before an engine is given up."""
OUR_OWN_KINDS = frozenset({"status", "feature_flags", "logs"})
"""Messages about the engine as a whole: front doors make their own."""


class Ending(StrEnum):
    """Why the watch ended."""

    OVER = "over"
    """The engine is done with the job (or does not know it)."""
    GONE = "gone"
    """It refuses connections."""
    SILENT = "silent"
    ZOMBIE = "zombie"
    """It answers, but what computes in it is dead."""


class Watch:
    """One attempt under watch."""

    def __init__(
        self,
        attempt: AttemptContext,
        *,
        api: EngineApi,
        socket: EventSocket,
        timings: Timings,
        loaders: frozenset[str],
    ) -> None:
        self.evidence = Evidence(job=attempt.job.id)
        self.load_seconds: float | None = None
        self.is_mute = False
        """The job ran and ended, or runs for long, without a word on the socket."""
        self._attempt = attempt
        self._api = api
        self._socket = socket
        self._timings = timings
        self._loaders = loaders
        self._loading_since: float | None = None
        self._ending: Ending | None = None
        self._wake = asyncio.Event()
        self._look_now = asyncio.Event()
        self._misses = 0
        self._missing_since = 0.0
        self._all_refused = True
        self._absent_since: float | None = None
        self._idle_wait_since: float | None = None
        self._unheard_since: float | None = None
        self._renewed_at = 0.0
        self._renewals = 0
        self._has_greeting = False

    # --- what comes by the socket

    def hear(self, message: Message, raw: bytes) -> None:
        """Take in a message of the engine, and pass on what is the job's."""
        is_ours = self.evidence.hear(message)
        if message.job is None and message.kind == "executing" and message.node is not None:
            # A reconnect's greeting: something that was sent with our socket's id runs.
            self._has_greeting = True
            return
        if not is_ours and (message.job is not None or message.kind in OUR_OWN_KINDS or not self._is_live):
            return
        is_step = message.kind == "progress"
        self._attempt.hub.publish(
            Progress(
                job=self._attempt.job.id,
                value=message.value if is_step else None,
                max=message.max if is_step else None,
                message=raw,
            )
        )
        if is_ours:
            self._measure_load(message)
            self._wake.set()

    def hear_frame(self, frame: bytes) -> None:
        """Pass on a preview or a text of the running job."""
        if not self._is_live:
            return
        picture, kind = preview_of(frame) or (None, None)
        self._attempt.hub.publish(
            Progress(
                job=self._attempt.job.id,
                text=text_of(frame),
                image=picture,
                image_type=kind,
                binary=frame,
            )
        )

    def look_now(self) -> None:
        """Look at once: something may have been missed."""
        self._look_now.set()

    @property
    def _is_live(self) -> bool:
        return self.evidence.has_started and not self.evidence.is_over

    def _measure_load(self, message: Message) -> None:
        if message.kind != "executing":
            return
        now = time.monotonic()
        if self._loading_since is not None:
            self.load_seconds = (self.load_seconds or 0.0) + now - self._loading_since
        self._loading_since = now if message.node in self._loaders else None

    # --- following

    async def follow(self) -> Ending:
        """Wait until the engine is done with the job."""
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._poll()), tasks.create_task(self._obey_cancel())]
            while self._ending is None and not self.evidence.is_over:
                if self.evidence.wants_entry:
                    await self._fetch_entry()
                else:
                    await self._wake.wait()
                self._wake.clear()
            for task in beside:
                task.cancel()
        if self._ending is Ending.ZOMBIE:
            await self._withdraw()
        self.is_mute = self.is_mute or self.evidence.heard == 0
        return Ending.OVER if self.evidence.is_over else self._ending or Ending.OVER

    async def _withdraw(self) -> None:
        """Take the job out of a queue that nobody works on, so that it cannot run there later as well."""
        try:
            await interrupt(self._api, self.evidence.job)
        except EngineError:
            pass  # the engine is given up all the same

    async def _fetch_entry(self) -> None:
        """The engine said that it is free: what it did is in the history, now or in some milliseconds."""
        try:
            for rest in ENTRY_RETRIES_SECONDS:
                if rest:
                    await asyncio.sleep(rest)
                entry = await self._api.entry(self.evidence.job)
                if entry is not None:
                    self.evidence.look(Look(began=self.evidence.heard, before=Place.ABSENT, entry=entry))
                    return
        except EngineError:
            pass
        self._look_now.set()  # the poll goes on with patience; it wakes us with what it finds
        await self._wake.wait()

    async def _poll(self) -> None:
        rest = self._timings.poll_first_seconds
        while True:
            await self._rest(rest)
            began = time.monotonic()
            try:
                await self._look()
                self._misses, self._all_refused = 0, True
            except EngineError as error:
                self._count_miss(error, began)
            self._wake.set()
            spent = time.monotonic() - began
            rest = max(self._timings.poll_seconds, spent / self._timings.poll_share)
            if self._misses or (self._absent_since is not None):
                rest = min(self._timings.poll_seconds, self._timings.quiet_seconds / 2)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._look_now.wait()
        except TimeoutError:
            pass
        self._look_now.clear()

    async def _look(self) -> None:
        """Ask queue, then history, then queue again, and take the answers in."""
        job, began = self.evidence.job, self.evidence.heard
        fresh = not self.evidence.was_accepted  # a submission without an answer: no connection of that time
        queue = await self._api.queue(fresh=fresh)
        before = queue.place_of(job)
        if before is not Place.ABSENT:
            self._absent_since = None
            self.evidence.look(Look(began=began, before=before))
            self._check_life(queue, before)
            return
        entry = await self._api.entry(job, fresh=fresh)
        after = Place.ABSENT
        if entry is None:
            after = (await self._api.queue(fresh=fresh)).place_of(job)
        now = time.monotonic()
        self._absent_since = self._absent_since or now
        is_settled = now - self._absent_since >= self._timings.quiet_seconds
        self.evidence.look(Look(began=began, before=before, entry=entry, after=after), is_settled=is_settled)

    def _count_miss(self, error: EngineError, began: float) -> None:
        if not self._misses:
            self._missing_since = began
        self._misses += 1
        self._all_refused = self._all_refused and is_refused(error)
        missing = time.monotonic() - self._missing_since
        if self._misses < MISSES_MIN:
            return
        if self._all_refused and missing >= self._timings.refused_seconds:
            self._ending = Ending.GONE
        elif missing >= self._timings.silent_seconds:
            self._ending = Ending.SILENT

    # --- an engine that answers and does not compute

    def _check_life(self, queue: QueueView, place: Place) -> None:
        """Notice that the engine's executing thread is dead. Slowness is no proof: a node may take an hour.

        1. The job waits while nothing runs: nobody takes it.
        2. It runs, but not one message came, and new sockets are not greeted with a running node either.
        """
        now = time.monotonic()
        waits_for_nothing = place is Place.WAITING and not queue.running
        self._idle_wait_since = (self._idle_wait_since or now) if waits_for_nothing else None
        if self._idle_wait_since is not None and now - self._idle_wait_since >= self._timings.zombie_seconds:
            self._ending = Ending.ZOMBIE
        is_unheard = place is Place.RUNNING and not self.evidence.heard and not self._has_greeting
        self._unheard_since = (self._unheard_since or now) if is_unheard else None
        if self._unheard_since is None:
            return
        unheard = now - self._unheard_since
        if unheard >= self._timings.stuck_seconds and self._renewals >= 2 and self._socket.is_connected:
            self._ending = Ending.ZOMBIE
        elif unheard >= self._timings.suspect_seconds and self._may_renew(now):
            self.is_mute = True
            self._renewed_at, self._renewals = now, self._renewals + 1
            self._socket.renew()

    def _may_renew(self, now: float) -> bool:
        return not self._renewals or now - self._renewed_at >= self._timings.stuck_seconds / 4

    # --- cancel

    async def _obey_cancel(self) -> None:
        await self._attempt.cancel_wanted.wait()
        while True:
            try:
                await interrupt(self._api, self._attempt.job.id)
            except EngineError:
                pass  # the looks tell whether it is gone
            self._look_now.set()
            await asyncio.sleep(self._timings.interrupt_seconds)
