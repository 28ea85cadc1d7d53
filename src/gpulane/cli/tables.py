"""Turns the API's documents into rows and sentences for people. Pure: `now` is given."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from gpulane.cli.documents import EngineDetail, Gpu, Job
from gpulane.cli.output import Rows

GIB = 1024**3


def job_rows(jobs: Sequence[Job], *, now: datetime) -> Rows:
    """List jobs."""
    return Rows(
        columns=("id", "state", "service", "user", "model", "gpu", "age", "took", "what"),
        rows=tuple(
            (
                job.id,
                job.state,
                job.service,
                job.user,
                _without_ending(job.model),
                _bare(job.gpu),
                _since(job.created_at, now),
                took(job, now),
                _what(job),
            )
            for job in jobs
        ),
        nothing="no such jobs",
        keep="id",
    )


def gpu_rows(gpus: Sequence[Gpu]) -> Rows:
    """List GPUs, one row per engine."""
    rows: list[tuple[str, ...]] = []
    for gpu in gpus:
        for number, engine in enumerate(gpu.engines):
            first = number == 0
            engine_state = f"{engine.state}: {engine.why}" if engine.why else engine.state
            rows.append(
                (
                    gpu.id if first else "",
                    gpu.state if first else "",
                    (gpu.job or gpu.why) if first else "",
                    _memory(gpu) if first else "",
                    engine.service,
                    engine.url,
                    _without_ending(engine.model),
                    engine_state,
                )
            )
    columns = ("gpu", "state", "job", "free memory", "service", "engine", "model", "engine state")
    return Rows(columns=columns, rows=tuple(rows), nothing="no GPUs")


def engine_rows(engines: Sequence[EngineDetail]) -> Rows:
    """List engines with their processes; of what is wrong, the process's word is the better one."""
    rows = [
        (
            engine.url,
            engine.gpu,
            engine.service,
            engine.state,
            "" if engine.process is None else engine.process.state,
            "" if engine.process is None or engine.process.pid is None else str(engine.process.pid),
            "" if engine.process is None else str(engine.process.restarts),
            (engine.process.why if engine.process is not None else "") or engine.why,
        )
        for engine in engines
    ]
    columns = ("engine", "gpu", "service", "state", "process", "pid", "restarts", "why")
    return Rows(columns=columns, rows=tuple(rows), nothing="no engines", keep="engine")


def job_facts(job: Job, *, now: datetime) -> list[tuple[str, str]]:
    """Tell all of one job, as names and values."""
    facts = [
        ("id", job.id),
        ("state", f"{job.state} (to be cancelled)" if job.cancel_wanted and not job.is_ended else job.state),
        ("service", f"{job.service} {job.kind}".rstrip()),
        ("user", job.user),
        ("model", job.model or "-"),
        ("priority", f"{job.band} {job.priority}"),
        ("created", f"{job.created_at}, {_since(job.created_at, now)} ago"),
    ]
    if job.labels:
        facts.append(("labels", ", ".join(job.labels)))
    if not job.is_ended and job.started_at is None:
        facts.append(("waits", explanation(job)))
    if job.progress is not None:
        facts.append(("progress", percent(job.progress.value, job.progress.max)))
    if job.started_at:
        facts.append(("took" if job.is_ended else "runs for", took(job, now)))
    for attempt in job.attempts:
        why = f": {attempt.error.message}" if attempt.error else ""
        facts.append((f"attempt {attempt.number}", f"{attempt.state} on {attempt.gpu} {attempt.engine}{why}"))
    if job.error is not None:
        facts.append(("error", f"{job.error.code}: {job.error.message}"))
    return facts


def explanation(job: Job) -> str:
    """Say why a job is where it is."""
    if job.is_ended:
        why = f": {job.error.message} ({job.error.code})" if job.error else ""
        return f"it waits no more: {job.state}{why}"
    if job.started_at is not None:
        return f"it waits no more: it runs on {job.gpu}"
    parts = [f"place {job.position}" if job.position else "no place yet"]
    if job.reason is not None:
        parts.append(f"{job.reason.text} ({job.reason.code})")
    if job.estimated_start_seconds is not None:
        low, high = job.estimated_start_seconds
        parts.append(f"starts in {low:.0f} to {high:.0f} s")
    return "; ".join(parts)


def percent(value: float, limit: float | None) -> str:
    """Tell how far it is."""
    return f"{value:g}" if not limit else f"{min(1.0, value / limit):.0%}"


def took(job: Job, now: datetime) -> str:
    """Tell how long it has run; empty when it has not started."""
    if job.started_at is None:
        return ""
    end = _time(job.finished_at) if job.finished_at else now
    return seconds_text((end - _time(job.started_at)).total_seconds())


def seconds_text(seconds: float) -> str:
    """Write a duration briefly."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def _what(job: Job) -> str:
    if job.error is not None:
        return job.error.message.partition("\n")[0]
    if job.progress is not None:
        return percent(job.progress.value, job.progress.max)
    if job.position is not None:
        return f"place {job.position}" + (f": {job.reason.text}" if job.reason else "")
    return "" if job.is_ended or job.reason is None else job.reason.text


def _memory(gpu: Gpu) -> str:
    if gpu.vram.bytes_free is None:
        return ""
    of = f" of {gpu.vram.bytes_total / GIB:.0f}" if gpu.vram.bytes_total else ""
    return f"{gpu.vram.bytes_free / GIB:.1f}{of} GiB"


def _bare(gpu: str | None) -> str:
    return (gpu or "").rpartition("/")[2]


def _without_ending(model: str | None) -> str:
    return (model or "").removesuffix(".safetensors").removesuffix(".ckpt")


def _since(text: str, now: datetime) -> str:
    return seconds_text((now - _time(text)).total_seconds()) if text else ""


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
