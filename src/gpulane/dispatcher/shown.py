"""Shows the gateway's gpus, engines, queue and the place of each job, from the book and the watches. Changes
nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping

from gpulane.core.book import Book
from gpulane.core.gpus import EngineView as BookEngineView
from gpulane.core.model import NO_MODEL, Engine, EngineState, GpuId, GpuState, JobId, Service
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.dispatcher.readings import Readings
from gpulane.views import EngineView, GpuView, Place, QueueView, Reason


class Shown:
    """Read-only pictures of the present."""

    def __init__(
        self,
        book: Book,
        owners: Mapping[GpuId, GpuOwner],
        clock: Callable[[], float],
        readings: Readings | None = None,
    ) -> None:
        self._book = book
        self._owners = owners
        self._clock = clock
        self._readings = readings

    def gpus(self) -> tuple[GpuView, ...]:
        """All gpus of this node, in the order of the settings."""
        return tuple(self._gpu(owner) for owner in self._owners.values())

    def queue(self) -> QueueView:
        """Count what waits and runs."""
        entries = self._book.waiting.entries.values()
        return QueueView(
            waiting=len(entries),
            running=len(self._book.active),
            paused=self._book.paused,
            waiting_by_service=dict(Counter(entry.job.service for entry in entries)),
        )

    def place(self, job: JobId) -> Place:
        """Tell where a job stands in fair order, why it waits, and about when it starts."""
        now = self._clock()
        reason = self._book.reason(job, now)
        return Place(
            position=self._book.job_place(job),
            reason=None
            if reason is None
            else Reason(code=reason.code, text=reason.text, args=dict(reason.args)),
            estimated_start_seconds=self._book.estimated_start_seconds(job, now),
        )

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return tuple(
            view
            for owner in self._owners.values()
            for view in self._engines(owner)
            if service is None or view.service is service
        )

    def sticky(self, service: Service, key: str) -> EngineView | None:
        """Rendezvous hashing: a key keeps its engine while that lives, and the others keep theirs when one
        goes.
        """
        live = [
            view for view in self.engines(service) if view.state in {EngineState.READY, EngineState.LEAKING}
        ]
        return max(
            live, key=lambda view: hashlib.sha256(f"{key}\0{view.url}".encode()).digest(), default=None
        )

    def _gpu(self, owner: GpuOwner) -> GpuView:
        known = self._book.gpu_view(owner.id)
        reports = [watch.report for watch in owner.watches.values() if watch.report is not None]
        totals = [r.vram_bytes_total for r in reports if r.vram_bytes_total is not None]
        frees = [r.vram_bytes_free for r in reports if r.vram_bytes_free is not None]
        card = None if self._readings is None else self._readings.last(owner.id)
        return GpuView(
            id=owner.id,
            name=owner.gpu.name,
            node=str(owner.id).rpartition("/")[0],
            uuid=owner.gpu.uuid,
            state=GpuState.LOST if known is None else known.state,
            why=owner.why,
            job=None if known is None else known.job,
            engines=self._engines(owner),
            vram_bytes_total=(card and card.bytes_total) or owner.gpu.vram_bytes or max(totals, default=None),
            # Engines count their own cache as free or not: the smallest answer is the safe one.
            vram_bytes_free=(
                min(frees, default=None) if card is None or card.bytes_free is None else card.bytes_free
            ),
            labels=owner.gpu.labels,
            utilization_percent=None if card is None else card.utilization_percent,
            temperature_celsius=None if card is None else card.temperature_celsius,
            power_watts=None if card is None else card.power_watts,
        )

    def _engines(self, owner: GpuOwner) -> tuple[EngineView, ...]:
        """Show what somebody runs there: that other programs may have the gpu is no engine to anybody."""
        known = self._book.gpu_view(owner.id)
        held = {} if known is None else {engine.url: engine for engine in known.engines}
        return tuple(
            _engine(engine, owner, held.get(engine.url))
            for engine in owner.gpu.engines
            if engine.service is not Service.LOCK
        )


def _engine(engine: Engine, owner: GpuOwner, known: BookEngineView | None) -> EngineView:
    """What probes say of it, and what only a hand-off can: that it answers and yet keeps its memory."""
    watch = owner.watches[engine.url]
    state, why = watch.state, watch.why
    if state is EngineState.READY and known is not None and known.state is EngineState.LEAKING:
        state, why = known.state, known.why
    return EngineView(
        url=engine.url,
        service=engine.service,
        name=engine.name,
        gpu=owner.id,
        state=state,
        why=why,
        # What decisions go by; the watch alone knows less, since most engines do not tell.
        model=NO_MODEL if known is None else known.model,
        description=watch.description,
    )
