"""Hands the progress of running attempts from engine clients to whoever listens: front doors, API, dashboard.

Listeners are called at once and must not wait; each keeps its own bounded buffer, so that a slow reader stops
nobody. What is published here is never stored: facts go through the store's events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpulane.core.model import JobId

RUNNING_MAX = 10_000
"""How many jobs' last progress is remembered: far above any number of gpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One message about a running attempt. Fields that a message does not tell are None."""

    job: JobId
    value: float | None = None
    max: float | None = None
    text: str | None = None
    image: bytes | None = None
    """A preview picture."""
    image_type: str | None = None
    """Its content type."""
    message: bytes | None = None
    """The service's own text message (ComfyUI's JSON with our ids), for its own front door."""
    binary: bytes | None = None
    """The service's own binary message (ComfyUI's preview frame, type 4)."""


Listener = Callable[[Progress], None]


class ProgressHub:
    """One per process."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._last: dict[JobId, Progress] = {}

    def publish(self, progress: Progress) -> None:
        """Tell every listener; remember the last value and picture of the job."""
        before = self._last.pop(progress.job, None)
        self._last[progress.job] = _merged(before, progress)
        while len(self._last) > RUNNING_MAX:
            del self._last[next(iter(self._last))]
        for listener in tuple(self._listeners):
            listener(progress)

    def last(self, job: JobId) -> Progress | None:
        """Tell the newest known value, text and picture of a running job."""
        return self._last.get(job)

    def forget(self, job: JobId) -> None:
        """Drop what is remembered of an ended attempt."""
        self._last.pop(job, None)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each message from now on; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None


def _merged(before: Progress | None, now: Progress) -> Progress:
    if before is None:
        return Progress(
            job=now.job,
            value=now.value,
            max=now.max,
            text=now.text,
            image=now.image,
            image_type=now.image_type,
        )
    return Progress(
        job=now.job,
        value=before.value if now.value is None else now.value,
        max=before.max if now.max is None else now.max,
        text=before.text if now.text is None else now.text,
        image=before.image if now.image is None else now.image,
        image_type=before.image_type if now.image is None else now.image_type,
    )
