"""Watches a running attempt for progress, and ends one that shows none for far too long.

The limit is `core.watchdog`'s: it allows for the job's size, its load and its gpu. A hung job is interrupted
first, as a cancelled one is; an engine that does not stop even then counts as hung itself. The gpu stays
occupied until its engine is known idle or gone, whatever is done about it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from gpulane.core.learned import Learned
from gpulane.core.model import Failure, FailureKind, GpuId, JobState, Seconds
from gpulane.core.watchdog import Patience, WatchStep, limit_seconds, step
from gpulane.engine.base import AttemptContext, Outcome, ServiceClient
from gpulane.engine.progress import Progress, ProgressHub

HUNG: Final = "hung"
"""Code of the failure of an attempt that showed no progress."""
LOOK_SECONDS: Final = 1.0
"""How often a running attempt is looked at; limits are minutes."""

_log = structlog.stdlib.get_logger(__name__)


async def run_watched(
    client: ServiceClient,
    context: AttemptContext,
    gpu: GpuId,
    *,
    hub: ProgressHub,
    learned: Learned,
    speed: float,
    patience: Patience,
    clock: Callable[[], Seconds],
    is_cancel_wanted: Callable[[], bool],
) -> Outcome:
    """Run the attempt; one that hangs ends as a failed attempt that killed its engine."""
    limit = limit_seconds(learned, context.job, gpu, patience, speed=speed)
    if limit is None:
        return await client.run(context)
    watch = _Watch(context, hub, clock)
    run = asyncio.get_running_loop().create_task(client.run(context))
    try:
        interrupted_at: Seconds | None = None
        while True:
            await asyncio.wait({run}, timeout=LOOK_SECONDS)
            if run.done():
                outcome = run.result()
                return outcome if interrupted_at is None else _hung(outcome, is_wanted=not is_cancel_wanted())
            todo = step(
                now=clock(),
                progress_at=watch.progress_at,
                interrupted_at=interrupted_at,
                limit=limit,
                patience=patience,
            )
            match todo:
                case WatchStep.WAIT:
                    pass
                case WatchStep.INTERRUPT if not is_cancel_wanted():
                    interrupted_at = clock()
                    _log.warning("job_hung", job=context.job.id, gpu=gpu, limit_seconds=round(limit, 1))
                    context.cancel_wanted.set()
                case WatchStep.INTERRUPT:
                    # The user's cancel is on its way already: the same patience from now on.
                    interrupted_at = clock()
                case WatchStep.GIVE_UP:
                    return _hung(None, is_wanted=not is_cancel_wanted())
    finally:
        watch.close()
        if not run.done():
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run


class _Watch:
    """When the attempt last showed progress."""

    def __init__(self, context: AttemptContext, hub: ProgressHub, clock: Callable[[], Seconds]) -> None:
        self.progress_at = clock()
        self._job = context.job.id
        self._clock = clock
        self._value: tuple[float | None, str | None] | None = None
        self.close = hub.listen(self._hear)

    def _hear(self, progress: Progress) -> None:
        """Only a change counts: an engine that repeats itself may hang all the same."""
        if progress.job != self._job:
            return
        value = (progress.value, progress.text)
        if value != self._value:
            self._value = value
            self.progress_at = self._clock()


def _hung(outcome: Outcome | None, *, is_wanted: bool) -> Outcome:
    """Judge an attempt that had to be interrupted; one that its user has cancelled is cancelled."""
    if outcome is not None and (
        outcome.state is JobState.SUCCEEDED or (outcome.state is JobState.CANCELLED and not is_wanted)
    ):
        return outcome
    message = "it made no progress for far longer than jobs like it take, and was interrupted"
    failure = Failure(kind=FailureKind.ENGINE, code=HUNG, message=message, killed_engine=True)
    idle = outcome is not None and outcome.engine_idle
    # The failure tells of the engine, whatever the job is: it did not stop.
    state = JobState.FAILED if is_wanted else JobState.CANCELLED
    return Outcome(state=state, failure=failure, engine_idle=idle)
