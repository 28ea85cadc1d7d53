"""What goes on beside a running request: progress for whoever listens, the interrupt when the job is not
wanted any more, and the proof that an engine has forgotten it. It never ends the occupancy itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from typing import Final

import structlog

from gpulane.adapters.a1111.requests import Meta
from gpulane.adapters.a1111.status import TaskProgress
from gpulane.core.model import Seconds
from gpulane.engine.a1111.looks import Look, Looks, Task
from gpulane.engine.a1111.pace import Pace
from gpulane.engine.base import AttemptContext
from gpulane.engine.progress import Progress
from gpulane.errors import EngineError

WITH_TASK: Final = frozenset({"txt2img", "img2img"})
"""Endpoints that take our id; the others run without any."""
IMAGE_BYTES_MAX: Final = 8 * 1024 * 1024

_log = structlog.stdlib.get_logger(__name__)


class Beside:
    """The companion of one request."""

    def __init__(
        self,
        context: AttemptContext,
        meta: Meta,
        *,
        looks: Looks,
        pace: Pace,
        clock: Callable[[], float],
        is_cold: bool,
    ) -> None:
        self.given_up = asyncio.Event()
        """The answer will not come: the engine forgot the job, or says nothing at all any more."""
        self.is_silent = False
        self._context = context
        self._meta = meta
        self._looks = looks
        self._pace = pace
        self._clock = clock
        self._is_cold = is_cold
        self._was_seen = False
        self._unknown_since: Seconds | None = None
        self._first_progress: tuple[Seconds, float] | None = None
        self._preview = -1

    async def run(self) -> None:
        """Poll until cancelled."""
        heard_at = self._clock()
        while True:
            await self._pause()
            try:
                await self._poll()
                heard_at = self._clock()
            except EngineError:
                # Busy, or gone: then the request itself will tell. Silence on all connections has a limit.
                if self._clock() - heard_at > self._pace.silent_seconds_max:
                    self.is_silent = True
                    self.given_up.set()
            except Exception:  # noqa: BLE001 - see below
                # A listener's mistake must not end the request beside it: the gpu would count as free.
                _log.exception("poll_failed", job=self._context.job.id)

    def load_seconds(self, began_at: Seconds, total: Seconds) -> Seconds | None:
        """Estimate how long the model took to load, from when sampling was first seen and how far it was."""
        if not self._is_cold or self._first_progress is None:
            return None
        seen_at, share = self._first_progress
        if not 0.0 < share < 1.0:
            return None
        # Sampling from `share` to the end took the rest of the time, so it began that much earlier.
        sampling = max(0.0, began_at + total - seen_at) / (1.0 - share)
        return max(0.0, total - sampling)

    async def interrupt(self, seen: Look) -> None:
        """Interrupt if the running job is ours. Sent again while it runs: one sent just before a start is
        lost.
        """
        if seen.is_idle:
            return
        if seen.task is Task.ACTIVE or (seen.task is not Task.QUEUED and self._is_ours(seen)):
            try:
                await self._looks.interrupt()
            except EngineError:
                # Asked again at the next look.
                return

    def _is_ours(self, seen: Look) -> bool:
        """Without an id, tell by the kind of job: the engine was idle before it, and works one at a time."""
        job = seen.state.state.job or ""
        if self._meta.endpoint in WITH_TASK:
            return seen.task is Task.UNTOLD and job.endswith(self._meta.endpoint)
        return bool(job) and not job.startswith(("scripts_", "task("))

    async def _pause(self) -> None:
        """Sleep between polls, less once the job is not wanted any more."""
        seconds = self._pace.poll_seconds
        if self._is_cold and self._first_progress is None:
            seconds = min(seconds, self._pace.poll_cold_seconds)
        if self._looks.has_tables is False:
            seconds = max(seconds, self._pace.poll_nowebui_seconds)
        wanted = self._context.cancel_wanted
        if wanted.is_set():
            await asyncio.sleep(min(seconds, self._pace.poll_cold_seconds))
            return
        try:
            async with asyncio.timeout(seconds):
                await wanted.wait()
        except TimeoutError:
            pass

    async def _poll(self) -> None:
        if self._context.cancel_wanted.is_set():
            await self.interrupt(await self._looks.look(self._context.job.id))
            return
        if self._meta.endpoint not in WITH_TASK:
            await self._poll_state()
            return
        task = await self._looks.task(self._context.job.id, preview=self._pace.previews, shown=self._preview)
        if task is None:
            await self._poll_state()
            return
        await self._watch_for_oblivion(task)
        self._publish_task(task)

    async def _poll_state(self) -> None:
        seen = await self._looks.state()
        if not seen.state.is_idle:
            self._saw_progress(seen.progress or 0.0)
            self._publish(
                Progress(job=self._context.job.id, value=seen.progress, max=1.0, text=seen.textinfo)
            )

    def _publish_task(self, task: TaskProgress) -> None:
        job = self._context.job.id
        if task.active:
            self._saw_progress(task.progress or 0.0)
            image, kind = self._picture(task)
            shown = Progress(
                job=job, value=task.progress, max=1.0, text=task.textinfo, image=image, image_type=kind
            )
            self._publish(shown)
        elif task.queued:
            self._publish(Progress(job=job, value=0.0, max=1.0, text=task.textinfo))

    def _publish(self, progress: Progress) -> None:
        self._context.hub.publish(progress)

    def _picture(self, task: TaskProgress) -> tuple[bytes | None, str | None]:
        uri = task.live_preview
        if not uri or not uri.startswith("data:") or len(uri) > IMAGE_BYTES_MAX:
            return None, None
        self._preview = self._preview if task.id_live_preview is None else task.id_live_preview
        head, _, data = uri.partition(",")
        try:
            return base64.b64decode(data), head.removeprefix("data:").split(";")[0]
        except binascii.Error:
            return None, None

    def _saw_progress(self, share: float) -> None:
        # The state says 0.01 from the very beginning, before anything is loaded.
        if share > 0.011 and self._first_progress is None:
            self._first_progress = (self._clock(), share)

    async def _watch_for_oblivion(self, task: TaskProgress) -> None:
        """An idle engine that does not know our task has restarted: on a half-open connection we would wait
        for ever.

        A finished task stays known until sixteen others have finished, so a slow answer is not taken for
        this.
        """
        self._was_seen = self._was_seen or task.active or task.queued
        if task.is_known:
            self._unknown_since = None
            return
        now = self._clock()
        self._unknown_since = now if self._unknown_since is None else self._unknown_since
        # One never seen may still be on its way to the engine, or have been done between two polls.
        patience = self._pace.forgotten_seconds if self._was_seen else self._pace.silent_seconds_max
        if now - self._unknown_since >= patience:
            seen = await self._looks.look(self._context.job.id)
            if seen.is_idle and seen.task is Task.UNKNOWN:
                self.given_up.set()
