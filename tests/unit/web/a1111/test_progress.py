"""What progress shows, without any gateway."""

import pytest

from gpulane.core.model import Account, Job, JobId, JobState, Service, Work
from gpulane.engine.progress import Progress
from gpulane.store.base import JobRecord
from gpulane.views import Place, Reason
from gpulane.web.a1111.progress import (
    Running,
    TaskQuery,
    queue_text,
    running_shown,
    task_not_running,
    task_running,
)

JOB = JobId("7d3d6bd2-6f0c-4a7b-8ac9-0b4f0f6c2a11")


def record(state: JobState = JobState.RUNNING, kind: str = "txt2img") -> JobRecord:
    job = Job(id=JOB, account=Account("ann"), service=Service.A1111, kind=kind, work=Work(steps=20))
    return JobRecord(job=job, state=state, v=1, meta=b"{}", started_at=1_700_000_000.0)


def running(value: float | None, *, elapsed: float | None = 10.0, image: bytes | None = None) -> Running:
    last = Progress(job=JOB, value=value, max=1.0, image=image)
    return Running(record=record(), last=last, elapsed_seconds=elapsed)


def place(
    position: int | None = 2, start: tuple[float, float] | None = (30.0, 50.0), code: str = "waiting_turn"
) -> Place:
    reason = Reason(code=code, text="The queue is paused;\nsee there.", args={})
    return Place(position=position, reason=reason, estimated_start_seconds=start)


def test_share_and_eta() -> None:
    shown = running_shown(running(0.5), with_image=True)
    assert shown.progress == pytest.approx(0.51) and shown.eta_relative == pytest.approx(10.0)
    assert (shown.state.sampling_step, shown.state.sampling_steps) == (10, 20)
    assert len(shown.state.job_timestamp) == 14


@pytest.mark.parametrize("value", [None, 0.0, -1.0])
def test_nothing_told_yet(value: float | None) -> None:
    shown = running_shown(running(value), with_image=True)
    assert shown.progress == 0.01 and shown.eta_relative == 0 and shown.state.job_count == 1


def test_more_than_all_is_all() -> None:
    shown = running_shown(running(2.0), with_image=True)
    assert shown.progress == 1.0 and shown.state.sampling_step == 20 and shown.eta_relative == 0


def test_picture_is_sent_once() -> None:
    first = task_running(running(0.5, image=b"x"), TaskQuery())
    assert first.live_preview == "data:image/png;base64,eA=="
    again = task_running(running(0.5, image=b"x"), TaskQuery(id_live_preview=first.id_live_preview))
    assert again.live_preview is None and again.id_live_preview == first.id_live_preview
    unwanted = task_running(running(0.5, image=b"x"), TaskQuery(live_preview=False))
    assert unwanted.live_preview is None and unwanted.id_live_preview == -1


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (place(), "In queue: 2/5, about 40 s"),
        (place(start=(60.0, 600.0)), "In queue: 2/5, about 6 min"),
        (place(start=None), "In queue: 2/5"),
        (place(start=None, code="queue_paused"), "In queue: 2/5. The queue is paused; see there."),
        (place(position=7, start=(0.0, 0.0)), "In queue: 7/7, about 1 s"),
        (place(position=None), "Starting"),
    ],
)
def test_queue_text_is_one_line(where: Place, text: str) -> None:
    assert queue_text(where, 5) == text


def test_ended_tasks_are_completed() -> None:
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        assert task_not_running(record(state), place(), 5).completed
    assert task_not_running(record(JobState.WAITING_RETRY), place(), 5).queued
