"""Follows jobs to their ends over their event streams, a few at one time, and shows how far they are.

A stream that breaks is taken up again where it ended: a gateway may be restarted under a waiting command.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from gpulane.cli.api import ApiClient, NoGateway
from gpulane.cli.documents import Job, JobMessage, PositionMessage, ProgressMessage, StateMessage
from gpulane.cli.options import job_path
from gpulane.cli.output import console, is_terminal
from gpulane.cli.tables import percent
from gpulane.errors import GpulaneError

if TYPE_CHECKING:
    from gpulane.cli.api import StreamMessage

STREAMS_MAX: Final = 8
"""Jobs followed at one time; the others' turn comes when one of these has ended."""
RECONNECT_SECONDS: Final = 1.0
GONE_SECONDS_MAX: Final = 60.0
"""How long a gateway may be away before the command gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What was heard of a job."""

    job: str
    text: str = ""
    value: float | None = None
    max: float | None = None
    end: Job | None = None
    error: GpulaneError | None = None
    """It can be followed no more: unknown, or the gateway is gone."""


def follow(api: ApiClient, jobs: Sequence[str]) -> Iterator[News]:
    """Follow jobs until each has ended or failed to be followed."""
    heard: queue.SimpleQueue[News] = queue.SimpleQueue()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def follow_in_turn() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = waiting.get_nowait()
                for news in follow_one(api, job):
                    heard.put(news)

    for _ in range(min(STREAMS_MAX, len(jobs))):
        # Daemons: after Ctrl-C nobody waits for a stream's next word.
        threading.Thread(target=follow_in_turn, daemon=True).start()
    left = len(jobs)
    while left:
        news = heard.get()
        left -= news.end is not None or news.error is not None
        yield news


def follow_one(api: ApiClient, job: str) -> Iterator[News]:
    """Follow one job; the last news has `end` or `error`."""
    last_id: str | None = None
    gone_since: float | None = None
    has_answered = False
    while True:
        try:
            for message in api.stream(job_path(job, "events"), last_id):
                has_answered, gone_since, last_id = True, None, message.id
                news = _news(job, message)
                if news is not None:
                    yield news
                if news is not None and news.end is not None:
                    return
            # The stream ended without the job's end: the gateway is stopping, or we had heard the end.
            found = api.get(Job, job_path(job))
            if found.is_ended:
                yield News(job=job, end=found)
                return
        except NoGateway as error:
            gone_since = gone_since or time.monotonic()
            # One that has never answered is not being restarted: it is the wrong address.
            if not has_answered or time.monotonic() - gone_since > GONE_SECONDS_MAX:
                yield News(job=job, error=error)
                return
        except GpulaneError as error:
            yield News(job=job, error=error)
            return
        time.sleep(RECONNECT_SECONDS)


def show_until_ended(api: ApiClient, jobs: Sequence[str]) -> tuple[list[Job], list[News]]:
    """Follow jobs with a bar for each on a terminal; returns those that ended, and what went wrong."""
    ended: list[Job] = []
    errors: list[News] = []
    with _bars(jobs) as show:
        for news in follow(api, jobs):
            show(news)
            if news.end is not None:
                ended.append(news.end)
            if news.error is not None:
                errors.append(news)
    order = {job: number for number, job in enumerate(jobs)}
    return sorted(ended, key=lambda job: order.get(job.id, 0)), errors


def _news(job: str, message: StreamMessage) -> News | None:
    """Read one message; kinds that we do not know are passed over."""
    try:
        match message.kind:
            case "job":
                found = msgspec.json.decode(message.data, type=JobMessage).job
                return News(job=job, text=found.state, end=found if found.is_ended else None)
            case "state":
                state = msgspec.json.decode(message.data, type=StateMessage)
                return News(job=job, text=state.state or state.what)
            case "position":
                place = msgspec.json.decode(message.data, type=PositionMessage)
                return News(job=job, text=f"place {place.position}" if place.position else "starting")
            case "progress":
                progress = msgspec.json.decode(message.data, type=ProgressMessage)
                text = progress.text or "running"
                return News(job=job, text=text, value=progress.value, max=progress.max)
            case _:
                return None
    except msgspec.MsgspecError:
        return None


class _Show:
    """Draws nothing."""

    def __call__(self, news: News) -> None:
        """Show news."""


class _Bars(_Show):
    """Draws a bar per job."""

    def __init__(self, jobs: Sequence[str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.fields[job]}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[words]:12}"),
            TimeElapsedColumn(),
            console=console(),
        )
        self._tasks = {
            job: self.progress.add_task("", total=None, job=job[:8], words="", start=True) for job in jobs
        }

    def __call__(self, news: News) -> None:
        """Show news."""
        task = self._tasks[news.job]
        if news.end is not None or news.error is not None:
            words = news.end.state if news.end else "unknown"
            done = 1.0 if words == "succeeded" else 0.0
            self.progress.update(task, total=1.0, completed=done, words=words)
            self.progress.stop_task(task)
        elif news.value is not None:
            words = percent(news.value, news.max)
            self.progress.update(task, total=news.max, completed=news.value, words=words)
        else:
            self.progress.update(task, words=news.text)


@contextlib.contextmanager
def _bars(jobs: Sequence[str]) -> Iterator[_Show]:
    if not is_terminal():
        yield _Show()
        return
    bars = _Bars(jobs)
    with bars.progress:
        yield bars
