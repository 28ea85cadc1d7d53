"""The two tables from which a webui answers who runs, who waits and how far it is, with their known mistakes.

A task that fails while it runs stays active until another starts; one that fails before it starts stays
pending for ever: the original's clean-up is not in its `finally`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gpulane.testing.card import Json
from gpulane.testing.pictures import render_png

MAX_FINISHED: Final = 16
PREVIEW_SIDE: Final = 64


@dataclass(slots=True, kw_only=True)
class State:
    """`shared.state`: one for the whole process, whoever's job it is."""

    clock: Callable[[], float]
    preview_every_steps: int = 10
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0
    textinfo: str | None = None
    started: float = 0.0

    def begin(self, job: str) -> None:
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job, self.job_no, self.job_count = job, 0, -1
        self.sampling_step = 0
        self.job_timestamp = time.strftime("%Y%m%d%H%M%S")
        self.textinfo = None
        self.started = self.clock()

    def end(self) -> None:
        self.job, self.job_count = "", 0

    def next_job(self) -> None:
        """One image batch is done."""
        self.job_no += 1
        self.sampling_step = 0

    def share_done(self) -> float:
        share = 0.0
        if self.job_count > 0:
            share += self.job_no / self.job_count
            if self.sampling_steps > 0:
                share += self.sampling_step / self.sampling_steps / self.job_count
        return min(1.0, share)

    def as_dict(self) -> dict[str, Json]:
        names = (
            "skipped interrupted stopping_generation job job_count job_timestamp job_no sampling_step "
            "sampling_steps"
        )
        return {name: getattr(self, name) for name in names.split()}

    @property
    def has_preview(self) -> bool:
        return self.job_count > 0 and self.sampling_step >= self.preview_every_steps

    def preview(self) -> bytes:
        return render_png("preview", self.sampling_step, "sim", PREVIEW_SIDE, PREVIEW_SIDE, {}, plain=True)

    def progress(self, encode: Callable[[bytes], str] | None) -> dict[str, Json]:
        """GET /sdapi/v1/progress; without `encode` no current image."""
        if self.job_count == 0:
            share, eta = 0.0, 0.0
        else:
            share = min(1.0, 0.01 + self.share_done())
            elapsed = self.clock() - self.started
            eta = elapsed / share - elapsed
        return {
            "progress": share,
            "eta_relative": eta,
            "state": self.as_dict(),
            "current_image": encode(self.preview()) if encode and self.has_preview else None,
            "textinfo": self.textinfo,
        }


@dataclass(slots=True, kw_only=True)
class TaskTable:
    """`modules/progress.py`: what the page's progress bar asks."""

    current: str | None = None
    pending: dict[str, float] = field(default_factory=dict[str, float])
    finished: list[str] = field(default_factory=list[str])

    def add(self, task_id: str, now: float) -> None:
        self.pending[task_id] = now

    def start(self, task_id: str) -> None:
        self.current = task_id
        self.pending.pop(task_id, None)

    def finish(self, task_id: str) -> None:
        if self.current == task_id:
            self.current = None
        self.finished.append(task_id)
        del self.finished[:-MAX_FINISHED]

    def progress(self, request: dict[str, Json], state: State, encode: Callable[[bytes], str]) -> Json:
        """POST /internal/progress."""
        task_id = request.get("id_task")
        shown: int = request.get("id_live_preview", -1)
        is_active, is_queued = task_id == self.current, task_id in self.pending
        answer: dict[str, Json] = {
            "active": is_active,
            "queued": is_queued,
            "completed": task_id in self.finished,
            "progress": None,
            "eta": None,
            "live_preview": None,
            "id_live_preview": -1,
            "textinfo": "Waiting...",
        }
        if not is_active:
            if is_queued:
                order = sorted(self.pending, key=lambda pending: self.pending[pending])
                answer["textinfo"] = f"In queue: {order.index(str(task_id)) + 1}/{len(order)}"
            return answer
        share = state.share_done()
        elapsed = state.clock() - state.started
        answer |= {
            "progress": share,
            "eta": elapsed / share - elapsed if share > 0 else None,
            "textinfo": state.textinfo,
            "id_live_preview": shown,
        }
        newest = state.sampling_step // state.preview_every_steps
        if request.get("live_preview", True) and state.has_preview and newest != shown:
            answer |= {
                "live_preview": "data:image/png;base64," + encode(state.preview()),
                "id_live_preview": newest,
            }
        return answer
