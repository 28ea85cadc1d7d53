"""Turns records and views of the gateway into the API's documents. Shows nobody what is not theirs to see."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, cast

from gpulane.core.model import ENDED, Band, Failure, GpuId, JobState
from gpulane.engine.base import RecordedResult
from gpulane.engine.progress import Progress
from gpulane.store.base import AttemptRecord, JobRecord
from gpulane.web.api.documents import (
    ArtifactDocument,
    AttemptDocument,
    BandName,
    EngineDetail,
    EngineDocument,
    ErrorDocument,
    GpuDocument,
    JobDocument,
    ProcessDocument,
    ProgressDocument,
    QueueDocument,
    ReasonDocument,
    VramDocument,
)
from gpulane.web.ports import EngineView, GpuView, JobsPort, Place, ProcessView, QueueView, Reason

_NOWHERE = Place(position=None, reason=None, estimated_start_seconds=None)


def job_document(record: JobRecord, jobs: JobsPort) -> JobDocument:
    """Show a job."""
    job = record.job
    place = _NOWHERE if record.state in ENDED or record.started else jobs.place(job.id)
    progress = jobs.hub.last(job.id) if record.state is JobState.RUNNING else None
    return JobDocument(
        id=job.id,
        service=job.service.value,
        kind=job.kind,
        user=job.account,
        state=record.state.value,
        cancel_wanted=record.cancel_wanted,
        position=place.position,
        reason=reason_document(place.reason),
        estimated_start_seconds=place.estimated_start_seconds,
        gpu=record.gpu,
        node=node_of(record.gpu),
        engine=record.engine,
        model=job.model or None,
        band=band_name(job.band),
        priority=job.priority,
        labels=sorted(job.labels),
        created_at=time_text(record.submitted_at),
        started_at=_time_or_none(record.started_at),
        finished_at=_time_or_none(record.finished_at),
        progress=progress_document(progress),
        attempts=[_attempt(attempt) for attempt in record.attempts],
        error=error_document(record.failure),
    )


def reason_document(reason: Reason | None) -> ReasonDocument | None:
    """Show a reason."""
    return None if reason is None else ReasonDocument(code=reason.code, text=reason.text, args=reason.args)


def error_document(failure: Failure | None) -> ErrorDocument | None:
    """Show a failure."""
    return None if failure is None else ErrorDocument(code=failure.code, message=failure.message)


def progress_document(progress: Progress | None) -> ProgressDocument | None:
    """Show progress, once there is a value."""
    if progress is None or progress.value is None:
        return None
    return ProgressDocument(value=progress.value, max=progress.max, text=progress.text)


def artifact_documents(record: JobRecord, result: RecordedResult) -> list[ArtifactDocument]:
    """Show the files of a result."""
    return [
        ArtifactDocument(
            number=number,
            name=artifact.name,
            content_type=artifact.content_type,
            bytes=artifact.bytes,
            node=artifact.node,
            url=f"/gpulane/v1/jobs/{record.job.id}/artifacts/{number}",
        )
        for number, artifact in enumerate(result.artifacts)
    ]


def gpu_document(gpu: GpuView, *, shows_job: bool) -> GpuDocument:
    """Show a gpu; `shows_job` where the job is the asker's own, or the asker an operator."""
    return GpuDocument(
        id=gpu.id,
        name=gpu.name,
        uuid=gpu.uuid,
        node=gpu.node,
        state=gpu.state.value,
        why=gpu.why,
        job=gpu.job if shows_job else None,
        engines=[_engine(engine) for engine in gpu.engines],
        vram=VramDocument(bytes_total=gpu.vram_bytes_total, bytes_free=gpu.vram_bytes_free),
        labels=sorted(gpu.labels),
        utilization_percent=gpu.utilization_percent,
        temperature_celsius=gpu.temperature_celsius,
        power_watts=gpu.power_watts,
    )


def engine_detail(engine: EngineView, process: ProcessView | None, *, can_restart: bool) -> EngineDetail:
    """Show an engine with its process."""
    shown = _engine(engine)
    return EngineDetail(
        url=shown.url,
        service=shown.service,
        name=shown.name,
        state=shown.state,
        why=shown.why,
        model=shown.model,
        flavor=shown.flavor,
        version=shown.version,
        gpu=engine.gpu,
        can_restart=can_restart,
        process=None if process is None else process_document(process),
    )


def process_document(process: ProcessView) -> ProcessDocument:
    """Show a process."""
    return ProcessDocument(
        state=process.state.value,
        why=process.why,
        pid=process.pid,
        restarts=process.restarts,
        since=time_text(process.since),
        exit_status=process.exit_status,
        is_adopted=process.is_adopted,
    )


def queue_document(queue: QueueView) -> QueueDocument:
    """Show the counts."""
    return QueueDocument(
        waiting=queue.waiting,
        running=queue.running,
        paused=queue.paused,
        waiting_by_service={service.value: count for service, count in queue.waiting_by_service.items()},
    )


def band_name(band: Band) -> BandName:
    """Name a band."""
    return cast("Literal['interactive', 'normal', 'batch']", band.name.lower())


def node_of(gpu: GpuId | None) -> str | None:
    """Return the name of a gpu's machine."""
    return None if gpu is None else gpu.partition("/")[0]


def time_text(at: float) -> str:
    """Write a time as RFC 3339 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time_or_none(at: float | None) -> str | None:
    return None if at is None else time_text(at)


def _attempt(attempt: AttemptRecord) -> AttemptDocument:
    return AttemptDocument(
        number=attempt.number,
        gpu=attempt.gpu,
        node=node_of(attempt.gpu) or "",
        engine=attempt.engine,
        state=attempt.state.value,
        claimed_at=time_text(attempt.claimed_at),
        started_at=_time_or_none(attempt.started_at),
        ended_at=_time_or_none(attempt.ended_at),
        error=error_document(attempt.failure),
    )


def _engine(engine: EngineView) -> EngineDocument:
    about = engine.description
    return EngineDocument(
        url=engine.url,
        service=engine.service.value,
        name=engine.name,
        state=engine.state.value,
        why=engine.why,
        model=engine.model or None,
        flavor=about.flavor if about else None,
        version=about.version if about else None,
    )
