"""Writes /sdapi/v1/progress and /internal/progress in A1111's shape, about one account's own jobs. Pure."""

from __future__ import annotations

import base64
import time
import zlib
from dataclasses import dataclass
from typing import Final

import msgspec

from gpulane.core.model import ENDED, JobState
from gpulane.engine.progress import Progress
from gpulane.store.base import JobRecord
from gpulane.views import Place

SHARE_SHOWN_MIN: Final = 0.01
"""What the engine adds to every share: a running job never shows 0 (modules/api/api.py, progressapi)."""
MINUTES_FROM_SECONDS: Final = 90.0


class State(msgspec.Struct, kw_only=True):
    """`state` of /sdapi/v1/progress, idle by default."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Shown(msgspec.Struct, kw_only=True):
    """Answer of /sdapi/v1/progress, idle by default: clients wait for progress 0 and job_count 0."""

    progress: float = 0.0
    eta_relative: float = 0.0
    state: State = msgspec.field(default_factory=State)
    current_image: str | None = None
    textinfo: str | None = None


class TaskQuery(msgspec.Struct, kw_only=True):
    """Body of POST /internal/progress."""

    id_task: str | None = None
    id_live_preview: int = -1
    live_preview: bool = True


class TaskShown(msgspec.Struct, kw_only=True):
    """Answer of /internal/progress, about an unknown task by default."""

    active: bool = False
    queued: bool = False
    completed: bool = False
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int = -1
    textinfo: str | None = "Waiting..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running job, and how far it is."""

    record: JobRecord
    last: Progress | None
    elapsed_seconds: float | None

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        last = self.last
        if last is None or last.value is None or not last.max or last.max <= 0:
            return 0.0
        return min(1.0, max(0.0, last.value / last.max))

    @property
    def eta_seconds(self) -> float | None:
        """How long it may still take, by what it took so far, as the engine estimates."""
        if self.elapsed_seconds is None or self.share <= 0:
            return None
        return self.elapsed_seconds / self.share - self.elapsed_seconds


# --- /sdapi/v1/progress -------------------------------------------------------------------------------------


def running_shown(running: Running, *, with_image: bool) -> Shown:
    """Show an account its running job."""
    last = running.last
    image = last.image if last is not None and with_image else None
    return Shown(
        progress=min(1.0, SHARE_SHOWN_MIN + running.share),
        eta_relative=running.eta_seconds or 0.0,
        state=_state(running),
        current_image=None if image is None else base64.b64encode(image).decode(),
        textinfo=last.text if last is not None else None,
    )


def _state(running: Running) -> State:
    record = running.record
    steps = record.job.work.steps
    started = "0"
    if record.started_at is not None:
        started = time.strftime("%Y%m%d%H%M%S", time.localtime(record.started_at))
    return State(
        interrupted=record.cancel_wanted,
        job=f"scripts_{record.job.kind}" if record.job.kind in {"txt2img", "img2img"} else record.job.kind,
        job_count=1,
        job_timestamp=started,
        sampling_step=int(running.share * steps),
        sampling_steps=steps,
    )


def waiting_shown(place: Place, waiting: int) -> Shown:
    """Show an account whose jobs all wait: an idle engine, but for the text."""
    return Shown(textinfo=queue_text(place, waiting))


# --- /internal/progress -------------------------------------------------------------------------------------


def task_running(running: Running, query: TaskQuery) -> TaskShown:
    """Show a running task; its picture only when the page has not got that one yet."""
    shown = TaskShown(
        active=True,
        progress=running.share,
        eta=running.eta_seconds,
        id_live_preview=query.id_live_preview,
        textinfo=running.last.text if running.last is not None else None,
    )
    image = running.last.image if running.last is not None else None
    if image is not None and running.last is not None and query.live_preview:
        # The page compares numbers for equality only, so a digest serves.
        number = zlib.crc32(image)
        if number != query.id_live_preview:
            kind = running.last.image_type or "image/png"
            shown.live_preview = f"data:{kind};base64,{base64.b64encode(image).decode()}"
            shown.id_live_preview = number
    return shown


def task_not_running(record: JobRecord, place: Place, waiting: int) -> TaskShown:
    """Show a task that waits or has ended."""
    if record.state in ENDED:
        return TaskShown(completed=True)
    assert record.state is not JobState.RUNNING, "shown by task_running"
    return TaskShown(queued=True, textinfo=queue_text(place, waiting))


def queue_text(place: Place, waiting: int) -> str:
    """Say where a waiting job stands, on one line: the page shows nothing of a text with a line break."""
    if place.position is None:
        return "Starting"
    text = f"In queue: {place.position}/{max(place.position, waiting)}"
    if place.estimated_start_seconds is not None:
        return f"{text}, about {_duration(sum(place.estimated_start_seconds) / 2)}"
    if place.reason is not None and place.reason.code != "waiting_turn":
        return f"{text}. {' '.join(place.reason.text.split())}"
    return text


def _duration(seconds: float) -> str:
    if seconds < MINUTES_FROM_SECONDS:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
