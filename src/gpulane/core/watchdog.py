"""How long a running job may go without any progress, and what follows when it has. It reads no clock, and
never takes a slow job for a hung one before its size, its load and its gpu are allowed for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpulane.core.learned import Learned
from gpulane.core.model import NO_MODEL, GpuId, Job, Seconds, Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """The settings it goes by (`health`)."""

    hung_factor: float = 6.0
    hung_seconds_min: Seconds = 300.0
    hung_interrupt_seconds: Seconds = 60.0


class WatchStep(StrEnum):
    """What to do about a running job now."""

    WAIT = "wait"
    INTERRUPT = "interrupt"
    """It is hung: tell the engine to stop it."""
    GIVE_UP = "give_up"
    """It did not stop either: the engine counts as hung. Restart it, or hold it for lost."""


def limit_seconds(
    learned: Learned, job: Job, gpu: GpuId, patience: Patience, *, speed: float = 1.0
) -> Seconds | None:
    """Returns how long the job may go without progress; None: without a limit of ours.

    At least `hung_seconds_min`; else `hung_factor` times what most jobs like it take, and its load on top,
    for no progress shows while a model loads. A lock shows no progress, and has its own time limit.
    """
    if job.service is Service.LOCK:
        return None
    service = learned.service_seconds_high(job, speed)
    load = learned.load_seconds(gpu, job.model, job.service) if job.model != NO_MODEL else 0.0
    return max(patience.hung_seconds_min, patience.hung_factor * service + load)


def step(
    *,
    now: Seconds,
    progress_at: Seconds,
    interrupted_at: Seconds | None,
    limit: Seconds | None,
    patience: Patience,
) -> WatchStep:
    """Returns what to do now about a job whose last progress, or start, was at `progress_at`.

    1. Interrupted by us: it gets `hung_interrupt_seconds` to stop, whatever it still reports.
    2. No limit, or not reached: wait.
    3. Else interrupt it.
    """
    if interrupted_at is not None:
        over = now - interrupted_at >= patience.hung_interrupt_seconds
        return WatchStep.GIVE_UP if over else WatchStep.WAIT
    if limit is None or now - progress_at < limit:
        return WatchStep.WAIT
    return WatchStep.INTERRUPT


def look_again_at(
    *,
    progress_at: Seconds,
    interrupted_at: Seconds | None,
    limit: Seconds | None,
    patience: Patience,
) -> Seconds | None:
    """Returns when `step` may next say something else than WAIT, if nothing happens; None: never."""
    if interrupted_at is not None:
        return interrupted_at + patience.hung_interrupt_seconds
    return None if limit is None else progress_at + limit
