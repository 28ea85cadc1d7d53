"""The live picture of `top` and `demo`: GPUs with their jobs, the head of the queue, counts; drawn from the
API's documents, as a table for a terminal or as one plain line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpulane.cli.documents import Gpu, Job, Queue
from gpulane.cli.output import STYLES

BAR_COLUMNS: Final = 16
WAITING_SHOWN: Final = 10
PAGE_MAX: Final = 500
"""Jobs that one page of the API may have; of a longer queue the newest are shown."""

PATHS: Final = (
    "/gpulane/v1/gpus",
    "/gpulane/v1/queue",
    f"/gpulane/v1/jobs?state=queued,running,waiting_retry&limit={PAGE_MAX}",
)
"""What a snapshot is made of: GpuList, Queue, JobList."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look at everything."""

    gpus: tuple[Gpu, ...]
    queue: Queue
    jobs: tuple[Job, ...]
    """Those that have not ended, as far as one page tells."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What to call accounts."""

    def job_of(self, gpu: Gpu) -> Job | None:
        """Return the job that a GPU is taken by."""
        return next((job for job in self.jobs if job.id == gpu.job), None)

    def waiting(self) -> list[Job]:
        """Return the waiting jobs, who goes next first."""
        taken = {gpu.job for gpu in self.gpus}
        waiting = [job for job in self.jobs if job.state != "running" and job.id not in taken]
        return sorted(waiting, key=lambda job: (job.position is None, job.position or 0))

    def name_of(self, account: str) -> str:
        """Return how an account is shown."""
        return self.names.get(account, account)


def overview(
    snapshot: Snapshot,
    *footer: RenderableType,
    waiting_shown: int = WAITING_SHOWN,
    keeps_height: bool = True,
) -> Group:
    """Draw everything. `keeps_height`: also rows that nobody waits in, for a picture drawn over and over."""
    queue = _queue_table(snapshot, waiting_shown, keeps_height=keeps_height)
    return Group(_gpu_table(snapshot), Text(), queue, Text(), *footer)


def plain_overview(snapshot: Snapshot) -> str:
    """Say the same in one line."""
    gpus = [f"{gpu.name} {_gpu_words(snapshot, gpu)}" for gpu in snapshot.gpus]
    paused = ", paused" if snapshot.queue.paused else ""
    return " | ".join([*gpus, f"waiting {snapshot.queue.waiting}{paused}"])


def share_done(job: Job) -> float | None:
    """Return how much of a running job is done, 0 to 1; None when nobody knows."""
    progress = job.progress
    if progress is None or not progress.max or progress.max <= 0:
        return None
    return min(1.0, max(0.0, progress.value / progress.max))


def _gpu_words(snapshot: Snapshot, gpu: Gpu) -> str:
    job = snapshot.job_of(gpu)
    if job is None:
        return gpu.state
    done = share_done(job)
    percent = "" if done is None else f" {done:.0%}"
    return f"{gpu.state} {job.service} {job.model or job.kind}{percent}"


def _gpu_table(snapshot: Snapshot) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    for name, width in (("GPU", None), ("STATE", 8), ("SERVICE", 7), ("USER", None), ("MODEL", None)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width)
    table.add_column("PROGRESS", no_wrap=True, width=BAR_COLUMNS + 5)
    for gpu in snapshot.gpus:
        job = snapshot.job_of(gpu)
        model = next((engine.model for engine in gpu.engines if engine.model), None)
        table.add_row(
            Text(gpu.name, style="bold"),
            Text(gpu.state, style=STYLES.get(gpu.state, "")),
            Text(job.service if job else ""),
            Text(snapshot.name_of(job.user) if job else ""),
            Text(_model(job.model)) if job else Text(_model(model), style="dim"),
            _bar(job, gpu),
        )
    return table


def _bar(job: Job | None, gpu: Gpu) -> RenderableType:
    if job is None:
        return Text(gpu.why, style="dim")
    done = share_done(job)
    if done is None:
        return Text("starting", style="dim")
    line = Table.grid(padding=(0, 1))
    line.add_column(width=BAR_COLUMNS)
    line.add_column(justify="right", width=4)
    line.add_row(ProgressBar(total=1.0, completed=done, width=BAR_COLUMNS), Text(f"{done:.0%}"))
    return line


def _queue_table(snapshot: Snapshot, shown: int, *, keeps_height: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    table.add_column("#", justify="right", min_width=3)
    table.add_column("USER", no_wrap=True, overflow="ellipsis")
    table.add_column("SERVICE", no_wrap=True, min_width=7)
    table.add_column("MODEL", no_wrap=True, overflow="ellipsis")
    table.add_column("WAITS BECAUSE", no_wrap=True, overflow="ellipsis", ratio=1)
    waiting = snapshot.waiting()
    for job in waiting[:shown]:
        table.add_row(
            str(job.position or ""),
            Text(snapshot.name_of(job.user)),
            Text(job.service),
            Text(_model(job.model)),
            Text(job.reason.text if job.reason else "", style="dim"),
        )
    for _ in range(shown - len(waiting) if keeps_height else 0):
        table.add_row()
    more = max(snapshot.queue.waiting, len(waiting)) - shown
    words = f"and {more} more" if more > 0 else "nothing waits" if not waiting else ""
    table.add_row("", Text("the queue is paused" if snapshot.queue.paused else words, style="dim"))
    return table


def _model(name: str | None) -> str:
    """Show a model without the file's ending."""
    return (name or "").removesuffix(".safetensors").removesuffix(".ckpt")
